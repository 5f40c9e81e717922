"""Writing a checkpoint folder: one writer at a time, files under temporary names until complete, the head last."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from foveate.checkpoint.head import DATA_FILE, HEAD, LARGEST_HEAD
from foveate.checkpoint.runs import Cuts, RunTable, Sums
from foveate.errors import CheckpointError, FoveateError
from foveate.files import Pieces, commit, locked, parse_json, read_regular, write_tensors

_STAGING = ".foveate-"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A data file that was written: its name, the SHA-256 of each tensor, and the runs of planes."""

    file: str
    checksums: Mapping[str, str]
    runs: Mapping[str, RunTable]


class Writer:
    """Writes into a folder whose lock is held; made by `writing`."""

    def __init__(self, folder: Path, staging: Path) -> None:
        self.folder, self._staging = folder, staging
        self.made: list[Path] = []

    def tensors(self, part: str, tensors: Mapping[str, Tensor | Pieces], cuts: Mapping[str, Cuts]) -> Written:
        """Write the data file of a part. Its name is made from its checksums, which are computed as it is written."""
        temporary = self._staging / f"{part}.safetensors"
        sums = {name: Sums(cuts.get(name)) for name in tensors}
        write_tensors(temporary, tensors, lambda name, piece: sums[name].add(piece))
        temporary.chmod(self.folder.stat().st_mode & 0o666)
        checksums = {name: one.whole() for name, one in sums.items()}
        digest = hashlib.sha256(dumped(checksums)).hexdigest()[:12]
        file = f"foveate-{part}-{digest}.safetensors"
        self._name(temporary, self.folder / file)
        runs = {name: table for name, one in sums.items() if (table := one.table()) is not None}
        return Written(file=file, checksums=checksums, runs=runs)

    def content(self, name: str, content: bytes) -> None:
        """Write any other file."""
        temporary = self._staging / name
        temporary.write_bytes(content)
        self._name(temporary, self.folder / name)

    def _name(self, temporary: Path, target: Path) -> None:
        if not target.exists():
            self.made.append(target)  # listed before it is named: an interrupt may come between any two lines
        commit(temporary, target)


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """Hold the lock of a folder, to write into it.

    Afterwards all data files that the head in the folder does not name are removed. If writing failed, so are the new
    files, unless the head names them.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        with locked(folder):
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
            writer = Writer(folder, staging)
            before = _head_of(folder)
            try:
                yield writer
            except BaseException:  # Ctrl-C too must leave no files behind
                after = _head_of(folder)
                if after == before:
                    named = _named(after)
                    for file in writer.made:
                        if file.name not in named:
                            file.unlink(missing_ok=True)
                raise
            else:
                _clear(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if isinstance(error, FoveateError):
            raise
        raise CheckpointError(f"cannot write {folder}: {error}") from error


def _head_of(folder: Path) -> bytes | None:
    try:
        return read_regular(folder / HEAD, LARGEST_HEAD)
    except (FileNotFoundError, CheckpointError):
        return None


def _named(head: bytes | None) -> set[str]:
    """The names of the files in a head; none if the head cannot be read."""
    try:
        return {entry["file"] for entry in parse_json(head or b"")["files"].values()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return set()


def _clear(folder: Path) -> None:
    """Remove the files of earlier saves and of writers that were killed.

    The lock is held, so only readers that have such files open still need them. A system that does not remove open
    files leaves them to the next save.
    """
    named = _named(_head_of(folder))
    for old in folder.iterdir():
        with suppress(OSError):
            if old.name.startswith(_STAGING) and old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            elif DATA_FILE.fullmatch(old.name) and old.name not in named:
                old.unlink()


def dumped(data: object) -> bytes:
    """JSON with sorted keys: the same data give the same bytes."""
    return json.dumps(data, sort_keys=True).encode()
