"""Runs: the pieces in which planes come into memory and leave it.

A tile's part of a plane is 64 to 512 bytes, which is too little to fetch. A *run* is what consecutive strips of one
weight have of one plane: at least 256 KiB, or the whole plane of a smaller weight. A run lies in one piece in the file
of its plane, and has a checksum of its own there.

Strips whose first planes are in memory can be read, at the level of the last of these. So a run is of use only where
the runs of all planes before it are in memory too.

Shapes: NT strips of a weight, G groups.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from foveate.errors import FoveateError
from foveate.formats.levels import NESTED_LEVELS, PLANES

#: The least bytes of a run, where a weight has more than that of a plane.
LEAST_RUN = 256 << 10
_SHA256_DIGITS = 64


def xxh3(content: Any) -> str:
    """The checksum of a run: XXH3 of 128 bits, which finds damage at the speed of memory. It keeps nobody out who may
    write the folder; neither does a SHA-256 that lies in the same folder.
    """
    return str(xxhash.xxh3_128_hexdigest(content))


@dataclass(frozen=True, kw_only=True)
class Tag:
    """What travels with a run: in the file, in memory, and in each transfer.

    Attributes:
        level: the level that its tiles can be read at once it is in memory, one of 2, 3, 4, 6, 8.
        importance: the loss that it saves, in the unit of the model's objective; NaN if it was not measured.
        sparsity: the share of its strips' tiles that do not store this plane, 0 to 1.
    """

    level: int
    importance: float = math.nan
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        if self.level not in NESTED_LEVELS:
            raise FoveateError(f"level (={self.level}) of a run is not one of 2, 3, 4, 6, 8")
        if not 0 <= self.sparsity <= 1:
            raise FoveateError(f"sparsity (={self.sparsity}) is not a share, 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run: consecutive strips of one plane of one weight.

    Attributes:
        weight: the name of the weight's site.
        plane: 0 to 4.
        first, last: its strips are `first` to `last - 1`.
        offset: where its bytes begin in the file of the plane.
        size: how many bytes it has.
        checksum: of its bytes, in hexadecimal: XXH3 of 128 bits, or SHA-256 where the folder lists no runs.
        tag: what travels with it.
    """

    weight: str
    plane: int
    first: int
    last: int
    offset: int
    size: int
    checksum: str
    tag: Tag

    def __post_init__(self) -> None:
        if not 0 <= self.plane < PLANES:
            raise FoveateError(f"plane (={self.plane}) is not one of 0 to {PLANES - 1}")
        if not 0 <= self.first < self.last or self.offset < 0 or self.size <= 0:
            raise FoveateError(
                f"a run of strips {self.first} to {self.last} with {self.size} bytes at {self.offset} is empty"
            )

    def holds(self, content: memoryview) -> bool:
        """Whether these are its bytes, as far as its checksum says."""
        if len(self.checksum) == _SHA256_DIGITS:
            return hashlib.sha256(content).hexdigest() == self.checksum
        return xxh3(content) == self.checksum

    def __str__(self) -> str:
        return f"plane {self.plane} of {self.weight}, strips {self.first} to {self.last - 1}"


def first_strips(strip_bytes: Sequence[int], least: int = LEAST_RUN) -> tuple[int, ...]:
    """Cut a plane into runs.

        first_strips([100, 100, 100, 100, 100], least=200)  # (0, 2)

    Args:
        strip_bytes: [NT], the bytes of the plane that each strip stores.
        least: the least bytes of a run.

    Returns:
        The first strip of each run, the first of them 0. Each run has at least `least` bytes, or there is one run.

    Raises:
        FoveateError: `least` is not positive.
    """
    if least <= 0:
        raise FoveateError(f"the least bytes of a run (={least}) are not positive")
    total, cuts, size = sum(strip_bytes), [0], 0
    taken = 0
    for strip, count in enumerate(strip_bytes):
        if size >= least and total - taken >= least and count:
            cuts.append(strip)
            size = 0
        size += count
        taken += count
    return tuple(cuts)
