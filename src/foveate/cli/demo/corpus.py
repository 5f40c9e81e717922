"""The training text of the demo's model: Python's own standard library, as bytes."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foveate.errors import DataError

_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "turtledemo",
        "ensurepip",
    }
)
_HELD_OUT_EVERY = 16


@dataclass(frozen=True, eq=False)
class Corpus:
    """Python source as bytes: uint8 [n] to train on, uint8 [m] of files kept from training; how many files each."""

    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: int


def corpus(root: Path | None = None) -> Corpus:
    """Read the standard library's sources, without tests and tables; every sixteenth file is held out.

    Raises:
        DataError: there is too little source (some installations keep only compiled files).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.rglob("*.py") if not _SKIPPED.intersection(f.relative_to(root).parts))
    texts = [f.read_bytes() for f in files]
    held_out = texts[_HELD_OUT_EVERY // 2 :: _HELD_OUT_EVERY]
    train = [t for i, t in enumerate(texts) if i % _HELD_OUT_EVERY != _HELD_OUT_EVERY // 2]
    parts = [b"\n\n".join(part) for part in (train, held_out)]
    if min(map(len, parts)) < 8192:
        raise DataError(
            f"{root} holds {sum(map(len, texts))} bytes of Python source, too little to learn from:"
            " the demo needs an installation of Python with its .py files"
        )
    left, right = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return Corpus(left, right, len(train), len(held_out))


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` windows from anywhere in a text: int64 [count, length]."""
    starts = torch.randint(0, len(text) - length, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)].long()
