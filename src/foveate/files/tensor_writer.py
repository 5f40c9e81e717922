"""Writing a safetensors file piece by piece, so that a tensor need never be in memory as a whole.

The head is padded with spaces to whole pages, which the format allows. So the first tensor begins on a page, and its
bytes can be read past the page cache (O_DIRECT) into memory that kernels read.

Source: the format of safetensors, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.files.tensors import DTYPES, bytes_of

#: Bytes of a page; the head of a file is a multiple of it.
PAGE = 4096
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A tensor that is given piece by piece.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        pieces: gives its bytes in order, as buffers, whose sizes add up to those of the shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Any]]

    def __post_init__(self) -> None:
        if self.dtype not in _NAMES:
            raise FoveateError(f"dtype (={self.dtype}) is not one that a safetensors file has")
        if any(size < 0 for size in self.shape):
            raise FoveateError(f"shape (={self.shape}) has a negative size")

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def pieces_of(tensor: Tensor) -> Pieces:
    """A tensor in memory as one piece."""
    whole = tensor.detach().contiguous()

    def pieces() -> Iterable[Any]:
        yield bytes_of(whole)

    return Pieces(dtype=whole.dtype, shape=tuple(whole.shape), pieces=pieces)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Pieces], seen: Callable[[str, memoryview], None]) -> None:
    """Write a safetensors file.

    Args:
        path: the file, which must not exist.
        tensors: what to write, by name.
        seen: called with the name of a tensor and each piece of its bytes, in order, for checksums.

    Raises:
        OSError: it cannot be written.
        FoveateError: the pieces of a tensor do not have the bytes of its shape.
    """
    given = {name: t if isinstance(t, Pieces) else pieces_of(t) for name, t in tensors.items()}
    # wide numbers first: then each tensor is aligned to its own numbers
    order = sorted(given, key=lambda name: (-given[name].dtype.itemsize, name))
    head: dict[str, Any] = {}
    at = 0
    for name in order:
        one = given[name]
        head[name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [at, at + one.size]}
        at += one.size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            written = 0
            for piece in given[name].pieces():
                view = memoryview(piece).cast("B")
                seen(name, view)
                file.write(view)
                written += len(view)
            if written != given[name].size:
                raise FoveateError(f"{name!r} was given {written} bytes, and its shape needs {given[name].size}")
