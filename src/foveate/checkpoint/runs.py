"""The runs that a head lists: where the planes of large weights are cut, and a checksum of each piece.

This is the feature `runs` of the format. Without it each plane is one run, and has the checksum of the whole plane.

Shapes: NT strips, G groups.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from foveate.errors import CheckpointError
from foveate.files import Pieces
from foveate.formats.levels import NESTED_LEVELS, WEIGHT_LEVELS
from foveate.formats.packing import tile_bytes
from foveate.memory.runs import LEAST_RUN, Run, Tag, first_strips
from foveate.planes import ExactTiles, highest
from foveate.precision.maps import Site

FEATURE = "runs"


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """The runs of one plane of one weight, as the head lists them.

    Attributes:
        strips: the first strip of each run, ascending from 0.
        xxh3: the checksum of each run.
        importance: the loss that each run saves, or empty if the model was not measured.
    """

    strips: tuple[int, ...]
    xxh3: tuple[str, ...]
    importance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        ascending = all(type(n) is int and a < n for a, n in zip((-1, *self.strips), self.strips, strict=False))
        if not self.strips or self.strips[0] != 0 or not ascending:
            raise ValueError(f"the first strips of runs (={self.strips[:5]}...) do not ascend from 0")
        if len(self.xxh3) != len(self.strips) or not all(isinstance(s, str) and len(s) == 32 for s in self.xxh3):
            raise ValueError(f"{len(self.strips)} runs have not as many checksums of 32 digits")
        if self.importance and len(self.importance) != len(self.strips):
            raise ValueError(f"{len(self.strips)} runs have {len(self.importance)} importances")
        if not all(type(v) in (int, float) and math.isfinite(v) for v in self.importance):
            raise ValueError("an importance of a run is not a finite number")

    def to_json(self) -> dict[str, Any]:
        """As it is in the head."""
        given = {"strips": list(self.strips), "xxh3": list(self.xxh3)}
        return given | ({"importance": list(self.importance)} if self.importance else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunTable:
        """The inverse of `to_json`; raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        if "xxh3" not in data:
            raise ValueError("its runs have no xxh3: an earlier state of foveate wrote it, save the model again")
        return cls(strips=tuple(data["strips"]), xxh3=tuple(data["xxh3"]), importance=tuple(data.get("importance", ())))


def strip_bytes(stored_levels: Tensor, plane: int, group: int) -> list[int]:
    """Bytes that each strip stores of a plane, [NT]; `stored_levels` is uint8 [NT, G]."""
    counts: list[int] = (stored_levels >= NESTED_LEVELS[plane]).sum(1).tolist()
    return [count * tile_bytes(plane, group) for count in counts]


def importance_of(losses: Tensor, stored_levels: Tensor, plane: int) -> list[float]:
    """The loss that each strip's part of a plane saves, [NT].

    Args:
        losses: float32 [T, 6], the loss of each tile at each of WEIGHT_LEVELS.
        stored_levels: uint8 [NT, G].
        plane: 0 to 4.
    """
    column = WEIGHT_LEVELS.index(NESTED_LEVELS[plane])
    saved = (losses[:, column - 1] - losses[:, column]).double().clamp_min(0).view_as(stored_levels)
    total: list[float] = torch.where(stored_levels >= NESTED_LEVELS[plane], saved, 0.0).sum(1).tolist()
    return total


def runs_of(
    site: Site, plane: int, stored_levels: Tensor, sha256: str, offset: int, table: RunTable | None
) -> list[Run]:
    """The runs of one plane of one weight.

    Args:
        site: the weight.
        plane: 0 to 4.
        stored_levels: uint8 [NT, G], the levels that the folder stores.
        sha256: the checksum of the whole plane.
        offset: where the plane begins in its file.
        table: what the head lists, or None if it lists no runs.

    Raises:
        CheckpointError: the head lists strips that the weight does not have, or a run that is empty.
    """
    sizes = strip_bytes(stored_levels, plane, site.group)
    if not sum(sizes):
        return []
    strips, checksums, importance = (
        ((0,), (sha256,), ()) if table is None else (table.strips, table.xxh3, table.importance)
    )
    if strips[-1] >= len(sizes):
        raise CheckpointError(f"the head lists strip {strips[-1]} of {site.name}, which has {len(sizes)}")
    stored = (stored_levels >= NESTED_LEVELS[plane]).double().mean(1)
    runs = []
    for i, first in enumerate(strips):
        last = strips[i + 1] if i + 1 < len(strips) else len(sizes)
        size = sum(sizes[first:last])
        if not size:
            raise CheckpointError(f"the head lists a run of {site.name} at strip {first} that stores nothing")
        tag = Tag(
            level=NESTED_LEVELS[plane],
            importance=importance[i] if importance else math.nan,
            sparsity=1 - float(stored[first:last].mean()),
        )
        run = Run(
            weight=site.name,
            plane=plane,
            first=first,
            last=last,
            offset=offset,
            size=size,
            checksum=checksums[i],
            tag=tag,
        )
        runs.append(run)
        offset += size
    return runs


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Where a plane that is written is cut into runs.

    Attributes:
        strips: the first strip of each run.
        ends: the byte at which each run ends.
        importance: the loss that each run saves, or empty.
    """

    strips: tuple[int, ...]
    ends: tuple[int, ...]
    importance: tuple[float, ...] = ()


def cuts_of(stored_levels: Tensor, plane: int, group: int, losses: Tensor | None) -> Cuts:
    """Where to cut a plane of a weight; `losses` is that of `importance_of`, or None."""
    sizes = strip_bytes(stored_levels, plane, group)
    strips = first_strips(sizes, LEAST_RUN)
    parts = list(zip(strips, (*strips[1:], len(sizes)), strict=True))
    ends, at = [], 0
    for first, last in parts:
        at += sum(sizes[first:last])
        ends.append(at)
    each = [] if losses is None else importance_of(losses, stored_levels, plane)
    importance = tuple(sum(each[first:last]) for first, last in parts) if each else ()
    return Cuts(strips=strips, ends=tuple(ends), importance=importance)


@dataclass
class Sums:
    """The checksums of a tensor that is written: of the whole, and of each of its runs.

    Attributes:
        cuts: where its runs end, or None if it has no runs.
    """

    cuts: Cuts | None = None
    _whole: Any = field(default_factory=hashlib.sha256)
    _run: Any = field(default_factory=xxhash.xxh3_128)
    _runs: list[str] = field(default_factory=list)
    _at: int = 0

    def add(self, piece: memoryview) -> None:
        """Take the next bytes."""
        self._whole.update(piece)
        if self.cuts is None:
            return
        while len(piece):
            end = self.cuts.ends[len(self._runs)]
            part = piece[: end - self._at]
            self._run.update(part)
            self._at += len(part)
            piece = piece[len(part) :]
            if self._at == end:
                self._runs.append(self._run.hexdigest())
                self._run.reset()

    def whole(self) -> str:
        """The SHA-256 of all bytes."""
        return str(self._whole.hexdigest())

    def table(self) -> RunTable | None:
        """The runs for the head; None if it has none."""
        if self.cuts is None or not self._runs:
            return None
        return RunTable(strips=self.cuts.strips, xxh3=tuple(self._runs), importance=self.cuts.importance)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredWeight:
    """A weight whose planes are given piece by piece, from memory or from the file they are in.

    Attributes:
        planes: the bytes of each plane.
        scales, gain, stored_levels, group, reach, exponent, exact: as of `foveate.planes.PlaneTensor`.
    """

    planes: tuple[Pieces, ...]
    scales: Tensor
    gain: Tensor
    stored_levels: Tensor
    group: int
    reach: int
    exponent: int
    exact: ExactTiles | None = None

    @property
    def highest_levels(self) -> Tensor:
        """The highest level at which each tile can be read, uint8 [NT, G]."""
        return highest(self.stored_levels, self.exact)


def plane_pieces(size: int, pieces: Callable[[], Iterable[Any]]) -> Pieces:
    """A plane of `size` bytes; `pieces` gives them as buffers."""
    return Pieces(dtype=torch.uint8, shape=(size,), pieces=pieces)
