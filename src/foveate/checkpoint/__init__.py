"""The folder that stores a quantized model.

A process that is killed while it writes loses nothing, and loading 4 bits reads only the planes of 4 bits.

    foveate.json                         the head: version, sites, default map, every tensor's file and checksum
    foveate-scales-<hash>.safetensors    scales, gains, and the stored level of each tile
    foveate-plane<p>-<hash>.safetensors  plane p of every weight (p = 0 the most significant)
    foveate-exact-<hash>.safetensors     tiles that are stored as floating point, if there are any
    foveate-rest-<hash>.safetensors      everything that is not on planes
    foveate-profile-<hash>.safetensors   the profile: what was measured
    foveate-frontier-<hash>.safetensors  the frontier, if there is one: a nested chain of maps

The head is the commit point. Data files have names made from their contents, and are complete before the head that
names them replaces the old head. Afterwards the files that the head does not name are removed. One writer at a time
holds the lock of the folder (`foveate.files.lock`). A reader holds no lock, and yet all that it reads is of one save
(`foveate.checkpoint.folder`). Nothing is unpickled, and no name in a head can point outside the folder.
"""

from foveate.checkpoint.folder import Folder as Folder
from foveate.checkpoint.folder import opened as opened
from foveate.checkpoint.frontier import frontier_later as frontier_later
from foveate.checkpoint.frontier import load_frontier as load_frontier
from foveate.checkpoint.head import HEAD as HEAD
from foveate.checkpoint.head import Head as Head
from foveate.checkpoint.head import PathLike as PathLike
from foveate.checkpoint.head import read_head as read_head
from foveate.checkpoint.profile import load_profile as load_profile
from foveate.checkpoint.profile import profile_later as profile_later
from foveate.checkpoint.profile import read_profile as read_profile
from foveate.checkpoint.runs import StoredWeight as StoredWeight
from foveate.checkpoint.store import Measurements as Measurements
from foveate.checkpoint.store import at_most_stored as at_most_stored
from foveate.checkpoint.store import read_planes as read_planes
from foveate.checkpoint.store import save_frontier as save_frontier
from foveate.checkpoint.store import save_map as save_map
from foveate.checkpoint.store import save_timings as save_timings
from foveate.checkpoint.store import write as write
from foveate.checkpoint.tiers import Tiers as Tiers
from foveate.checkpoint.tiers import read_tiers as read_tiers
from foveate.checkpoint.tiers import stored_weight as stored_weight
