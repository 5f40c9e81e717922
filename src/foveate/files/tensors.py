"""TensorFile: a safetensors file that is read tensor by tensor through one descriptor.

The file is opened once, so its contents can be read even if its name is removed meanwhile. It is not mapped into
memory. So a file that is truncated while it is read is an error and not a crash, and its pages do not count as memory
of this process.

    8 bytes      the length of the head, little-endian
    the head     JSON: for each tensor its dtype, shape, and [begin, end) in what follows; the tensors cover it exactly
    the rest     the tensors' bytes, little-endian

Source: the format of safetensors, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from foveate.errors import CheckpointError
from foveate.files.regular import open_regular, parse_json

#: The dtypes of a safetensors file, by their names in it.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_LARGEST_HEAD = 100_000_000  # as safetensors has it
_MOST_DIMENSIONS = 64  # as torch has it


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype and shape, and its `size` bytes from offset `begin` on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int


class TensorFile:
    """An open safetensors file. Close it, or use it in `with`.

    Attributes:
        path: where it was when it was opened.
        entries: its tensors.
        metadata: the texts that are stored with them.
        bytes: the size of the file.
    """

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        """Read the head.

        Args:
            path: the file.
            file: the same file if it is open already; it is closed with this object.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is not a regular file, or its head is malformed.
        """
        self.path = path
        self._file = open_regular(path) if file is None else file
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        try:
            self._read_head()
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.close()
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; no tensor can be read afterwards."""
        self._file.close()

    @property
    def descriptor(self) -> int:
        """The number of the open file; it is closed with this object."""
        return self._file.fileno()

    def _read_head(self) -> None:
        self.bytes = self._file.seek(0, 2)
        length = int.from_bytes(self._read(bytearray(8), 0), "little")
        if length > min(_LARGEST_HEAD, self.bytes - 8):
            raise ValueError(f"its head is said to have {length:,} bytes")
        data = parse_json(bytes(self._read(bytearray(length), 8)))
        if not isinstance(data, dict):
            raise ValueError("its head is not a table")
        metadata = data.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are not texts")
        self.metadata = metadata
        for name, about in data.items():
            self.entries[name] = _entry(name, about, 8 + length)
        at = 8 + length
        for entry in sorted(self.entries.values(), key=lambda e: (e.begin, e.size)):
            if entry.begin != at:
                raise ValueError("its tensors do not lie one after another")
            at += entry.size
        if at != self.bytes:
            raise ValueError(f"it has {self.bytes:,} bytes, and its tensors end at {at:,}")

    def read(self, name: str, sha256: str | None = None) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            CheckpointError: it is missing or truncated, or its SHA-256 is not `sha256`, if that is given.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} is damaged: it holds no {name!r}")
        try:
            raw = torch.empty(entry.size, dtype=torch.uint8)
            self._read(bytes_of(raw), entry.begin)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: not enough memory
            raise CheckpointError(f"{self.path} is damaged: {name!r}: {error}") from error
        if sha256 is not None and checksum(raw) != sha256:
            raise CheckpointError(f"{self.path} is damaged: the checksum of {name!r} does not match")
        if entry.dtype == torch.bool and bool((raw > 1).any()):
            raise CheckpointError(f"{self.path} is damaged: {name!r} is neither true nor false everywhere")
        return raw.view(entry.dtype).view(entry.shape)

    def _read(self, into: Any, at: int) -> Any:
        """Fill a buffer with the bytes at an offset, and return it."""
        view = memoryview(into).cast("B")
        self._file.seek(at)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise ValueError("it is cut off")
            done += count
        return into


def _entry(name: str, about: Any, offset: int) -> Entry:
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described")
    shape, offsets = about["shape"], about["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets):
        raise ValueError(f"{name!r} has a shape or place that is not of whole numbers")
    if not isinstance(about["dtype"], str) or about["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has the dtype {about['dtype']!r}")
    dtype = DTYPES[about["dtype"]]
    if len(shape) > _MOST_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"{name!r} has {len(shape)} dimensions")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} does not have the bytes that its shape needs")
    return Entry(dtype, tuple(shape), offset + offsets[0], offsets[1] - offsets[0])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 60 for n in values)


def checksum(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    whole = tensor.contiguous()  # kept alive while its bytes are read
    return hashlib.sha256(bytes_of(whole)).hexdigest()


def bytes_of(tensor: Tensor) -> Any:
    """A buffer over a contiguous tensor's bytes, which must outlive it."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else bytearray()
