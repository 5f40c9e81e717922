"""Writing a checkpoint folder: one writer at a time, files aside until they are complete, the head last."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from foveate.checkpoint.head import DATA_FILE, HEAD, LARGEST_HEAD
from foveate.errors import CheckpointError, FoveateError
from foveate.files import commit, locked, parse_json, read_regular

_STAGING = ".foveate-"


class Writer:
    """Writes into a folder that is held; made by `writing`."""

    def __init__(self, folder: Path, staging: Path) -> None:
        self.folder, self._staging = folder, staging
        self.made: list[Path] = []

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file."""
        temporary = self._staging / name
        save_file({key: t.contiguous() for key, t in tensors.items()}, temporary)
        # safetensors keeps its files to their owner; ours are as open as the folder
        temporary.chmod(self.folder.stat().st_mode & 0o666)
        self._name(temporary, self.folder / name)

    def content(self, name: str, content: bytes) -> None:
        """Write any other file."""
        temporary = self._staging / name
        temporary.write_bytes(content)
        self._name(temporary, self.folder / name)

    def _name(self, temporary: Path, target: Path) -> None:
        if not target.exists():
            self.made.append(target)  # before it has its name: an interrupt may come between any two lines
        commit(temporary, target)


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """Hold a folder, to write into it. Afterwards only what the head in place names is left of our data files; if
    writing failed, what was newly made is gone, unless the head in place names it.

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
            except BaseException:  # Ctrl-C too must leave nothing behind
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
    except (OSError, SafetensorError) as error:
        if isinstance(error, FoveateError):
            raise
        raise CheckpointError(f"cannot write {folder}: {error}") from error


def _head_of(folder: Path) -> bytes | None:
    try:
        return read_regular(folder / HEAD, LARGEST_HEAD)
    except (FileNotFoundError, CheckpointError):
        return None


def _named(head: bytes | None) -> set[str]:
    """The files that a head names, as far as it can be read."""
    try:
        return {entry["file"] for entry in parse_json(head or b"")["files"].values()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return set()


def _clear(folder: Path) -> None:
    """Remove what killed and earlier writers left. The folder is held, so that nobody needs it but readers that have it
    open; a system that does not remove open files leaves them to the next save.
    """
    named = _named(_head_of(folder))
    for old in folder.iterdir():
        with suppress(OSError):
            if old.name.startswith(_STAGING) and old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            elif DATA_FILE.fullmatch(old.name) and old.name not in named:
                old.unlink()


def dumped(data: object) -> bytes:
    """JSON that is the same for the same data."""
    return json.dumps(data, sort_keys=True).encode()
