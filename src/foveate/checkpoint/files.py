"""Files of a checkpoint folder: written aside and renamed when complete, read one checked tensor at a time."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveate.errors import CheckpointError, FoveateError

_OPEN_FOR = 16 << 20


@contextmanager
def writing(folder: Path) -> Iterator[list[Path]]:
    """A folder to write into; what was newly made in it is removed again if writing fails."""
    existed = folder.exists()
    made: list[Path] = []
    try:
        _staging(folder).mkdir(parents=True, exist_ok=True)
        yield made
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        for file in made:
            file.unlink(missing_ok=True)
        shutil.rmtree(_staging(folder), ignore_errors=True)
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, FoveateError):
            raise CheckpointError(f"cannot write {folder}: {error}") from error
        raise
    finally:
        shutil.rmtree(_staging(folder), ignore_errors=True)


def _staging(folder: Path) -> Path:
    """Where files are written before they get their names; safetensors puts temporary files of its own beside them."""
    return folder / f".foveate-{os.getpid()}"


def write_tensors(target: Path, tensors: Mapping[str, Tensor], made: list[Path]) -> None:
    """Write a safetensors file; `made` is what `writing` gave."""
    temporary = _staging(target.parent) / target.name
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
    # safetensors keeps its files to their owner; ours are as open as the folder
    temporary.chmod(temporary.parent.stat().st_mode & 0o666)
    _name(temporary, target, made)


def write_bytes(target: Path, content: bytes, made: list[Path]) -> None:
    """Write any other file; `made` is what `writing` gave."""
    temporary = _staging(target.parent) / target.name
    temporary.write_bytes(content)
    _name(temporary, target, made)


def _name(temporary: Path, target: Path, made: list[Path]) -> None:
    new = not target.exists()
    _commit(temporary, target)
    if new:
        made.append(target)


def _commit(temporary: Path, target: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Make a new name last: what follows it must not be on the disk before it is."""
    with suppress(OSError):  # a system that cannot open folders, or sync them
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def checksum(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    whole = tensor.contiguous()  # kept alive while its bytes are read
    return hashlib.sha256(_bytes_of(whole)).hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """A buffer over a contiguous tensor's bytes, which must outlive it."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


class Reader:
    """Reads tensors from files, each checked against its checksum.

    A file stays open for the next tensor, since opening one lists all that is in it. It is opened anew after every
    `_OPEN_FOR` bytes, for its pages count as memory while it is mapped. Nothing stays open when the reader is gone.
    """

    def __init__(self) -> None:
        self._open: dict[Path, tuple[Any, int]] = {}

    def tensor(self, file: Path, name: str, sha256: str | None) -> Tensor:
        """One tensor. Its memory is the file's: copy what is to be kept."""
        try:
            opened, done = self._open.pop(file, (None, 0))
            if opened is None:
                opened = safe_open(file, "pt")
            tensor: Tensor = opened.get_tensor(name)
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        done += tensor.numel() * tensor.element_size()
        if done < _OPEN_FOR:
            self._open[file] = (opened, done)
        if checksum(tensor) != sha256:
            raise CheckpointError(f"{file} is damaged: the checksum of {name!r} does not match")
        return tensor
