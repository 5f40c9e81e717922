"""Reading a folder that others may be saving to: a head and the files it names, all of one save.

A save that ends between reading the head and opening a file has removed that file. Then the head is another one, and it
is read again. Once the files are open, what they hold can be read whatever becomes of their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from foveate.checkpoint.head import Head, PathLike, read_head
from foveate.errors import CheckpointError
from foveate.files import TensorFile, open_regular

#: How often a head is read again because a save has replaced it.
_TRIES = 100


@dataclass
class Folder:
    """An open folder; made by `opened`.

    Attributes:
        path: where it is.
        head: its head.
        files: for each part its file, open, or why it cannot be opened.
    """

    path: Path
    head: Head
    files: dict[str, BinaryIO | TensorFile | CheckpointError]

    def part(self, part: str) -> TensorFile:
        """The file of a part (`scales`, `plane0`, ...).

        Raises:
            CheckpointError: it is missing or damaged.
        """
        file = self.files[part]
        if isinstance(file, CheckpointError):
            raise file
        if not isinstance(file, TensorFile):
            file = self.files[part] = TensorFile(self.path / self.head.files[part], file)
        return file

    def read(self, part: str, name: str, most: int) -> Tensor:
        """A tensor of a part, checked against its checksum, in memory of its own.

        Args:
            part: `scales`, `plane0`, ...
            name: which of its tensors.
            most: bytes that it may have: a file with holes takes no room on the disk, and as much memory as it says.

        Raises:
            CheckpointError: it is missing, damaged, or larger.
        """
        sha256 = self.head.checksums[part].get(name)
        if sha256 is None:
            raise CheckpointError(f"{self.path} lists no {name!r} among its {part}")
        file = self.part(part)
        entry = file.entries.get(name)
        if entry is not None and entry.size > most:
            raise CheckpointError(f"{self.path}: {part} of {name!r} is malformed: {entry.size:,} bytes, not {most:,}")
        return file.read(name, sha256)

    @property
    def bytes(self) -> int:
        """Bytes of the files that the head names.

        Raises:
            CheckpointError: one of them is missing or damaged.
        """
        return sum(self.part(part).bytes for part in self.head.files)


@contextmanager
def opened(path: PathLike) -> Iterator[Folder]:
    """Open a folder to read from it.

    Raises:
        CheckpointError: no such folder, no head in it, a newer version, or a malformed head. What is wrong with a file
            is raised when it is read.
    """
    folder = Path(path)
    for _ in range(_TRIES):
        head = read_head(folder)
        with ExitStack() as stack:
            files: dict[str, BinaryIO | TensorFile | CheckpointError] = {}
            gone = False
            for part, name in head.files.items():
                try:
                    files[part] = stack.enter_context(open_regular(folder / name))
                except FileNotFoundError:
                    files[part], gone = CheckpointError(f"{folder / name} is missing"), True
                except CheckpointError as error:
                    files[part] = error
            if gone and read_head(folder).sha256 != head.sha256:
                continue
            yield Folder(folder, head, files)
            return
    raise CheckpointError(f"{folder} was replaced {_TRIES} times while it was opened")
