"""Files: each is complete or absent, is read only if it is a regular file, and has one writer at a time.

All that foveate writes to a disk is written here: the folder of a model, the profile of a model in training, the file
that a calibration is resumed from. A file is written under a temporary name and then renamed.
"""

from foveate.files.atomic import commit as commit
from foveate.files.atomic import make_folder as make_folder
from foveate.files.atomic import replacing as replacing
from foveate.files.lock import LOCK as LOCK
from foveate.files.lock import locked as locked
from foveate.files.regular import open_regular as open_regular
from foveate.files.regular import parse_json as parse_json
from foveate.files.regular import read_regular as read_regular
from foveate.files.tensor_writer import PAGE as PAGE
from foveate.files.tensor_writer import Pieces as Pieces
from foveate.files.tensor_writer import write_tensors as write_tensors
from foveate.files.tensors import TensorFile as TensorFile
from foveate.files.tensors import bytes_of as bytes_of
from foveate.files.tensors import checksum as checksum
