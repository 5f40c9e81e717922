"""Reading a folder that other processes may be saving to: a head and the files that it names, all of one save.

If a save ends after the head was read and before a file was opened, it has removed that file. Then the folder has
another head, which is read instead. Once the files are open, their contents can be read even after their names are
removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch import Tensor

from foveate.checkpoint.files import dumped
from foveate.checkpoint.head import Head, PathLike, read_head
from foveate.errors import CheckpointError
from foveate.files import TensorFile, open_regular

T = TypeVar("T")
#: How often a head is read again because a save has replaced it.
_TRIES = 100


@dataclass
class Folder:
    """A checkpoint folder whose files are open; made by `opened`.

    Attributes:
        path: where it is.
        head: its head.
        files: for each part its open file, or the error if it cannot be opened.
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
        """Read a tensor of a part into memory of its own, and compare it with its checksum.

        Args:
            part: `scales`, `plane0`, ...
            name: which of its tensors.
            most: the greatest size in bytes. A sparse file takes little room on the disk, and all of its stated size in
                memory.

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


def later(folder: Folder, about: Callable[[Head], Any], read: Callable[[Folder], T], what: str) -> Callable[[], T]:
    """A function that reads a part of a folder when it is called; it raises `CheckpointError` if another save has
    replaced that part meanwhile.

    Args:
        folder: the folder, open now.
        about: what the head says of the part, which is the same as long as the part is.
        read: reads the part of a folder that is open.
        what: the part, in words.
    """
    return partial(_read_again, folder.path.absolute(), _digest(about(folder.head)), about, read, what)


def _read_again(path: Path, wanted: str, about: Callable[[Head], Any], read: Callable[[Folder], T], what: str) -> T:
    with opened(path) as now:
        if _digest(about(now.head)) != wanted:
            raise CheckpointError(f"{path} holds another save than the model was loaded from: {what} is gone")
        return read(now)


def _digest(about: Any) -> str:
    return hashlib.sha256(dumped(about)).hexdigest()


@contextmanager
def opened(path: PathLike) -> Iterator[Folder]:
    """Open a folder to read from it.

    Raises:
        CheckpointError: no such folder, no head in it, a newer version, or a malformed head. An error in a
            data file is raised when that file is read.
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
