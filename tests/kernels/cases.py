"""Random calls of `plane_linear`, and the same call by the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.planes import reference
from foveate.planes import PlaneTensor, linear
from tiny import LEVELS, coded, generator, random_levels, with_exact

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


KNOWN_ISAS = ("avx512_vnni", "avx2", "portable")


def isas() -> list[str]:
    """The instruction sets that this machine's compiled kernels can be made to use; none without a compiler."""
    if ensure_loaded().isa is None:
        return []
    have = []
    for name in KNOWN_ISAS:
        try:
            with forced(name):
                have.append(name)
        except RuntimeError:
            continue
    return have


@contextmanager
def forced(isa: str) -> Iterator[None]:
    before = torch.ops.foveate._cpu_isa("")
    torch.ops.foveate._cpu_isa(isa)
    try:
        yield
    finally:
        torch.ops.foveate._cpu_isa(before)


def pairs(map_of_row: Tensor) -> Tensor:
    """The maps of each row, low and high, uint8 [M, 2]."""
    return map_of_row.to(torch.uint8).view(-1, 1).repeat(1, 2)


@dataclass
class Call:
    x: Tensor
    weights: list[PlaneTensor]
    biases: list[Tensor]
    input_level: Tensor
    map_of_row: Tensor | None = None
    order: Tensor | None = None
    input_range: Tensor | None = None

    @property
    def maps(self) -> Tensor | None:
        """The map of each row as pairs, uint8 [M, 2]."""
        return None if self.map_of_row is None else pairs(self.map_of_row)

    def op_args(self) -> tuple[Any, ...]:
        tensors = [t for w in self.weights for t in w.tensors]
        geometries = [number for w in self.weights for number in w.geometry]
        return self.x, tensors, self.biases, geometries, self.input_level, self.maps, self.order, self.input_range

    def run(self) -> list[Tensor]:
        return linear(self.x, self.weights, self.biases, self.input_level, self.maps, self.order, self.input_range)

    def by_reference(self) -> list[Tensor]:
        return reference.plane_linear(*self.op_args())


def sizes(least: int, greatest: int, *edges: int) -> st.SearchStrategy[int]:
    """Any size of a range, every other one of them at the edge of a strip, a group, a chunk or a block of lanes."""
    return st.sampled_from((least, *edges, greatest)) | st.integers(least, greatest)


ROWS = sizes(1, 300, 15, 16, 17, 31, 32, 33, 48, 64, 65)
COLUMNS = sizes(1, 300, 3, 31, 32, 33, 64, 127, 128, 129, 160, 256, 257)
ROWS_OF_X = sizes(0, 40, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24, 25)


def _levels(draw: st.DrawFn, w: PlaneTensor, seed: int) -> Tensor:
    """A level for each tile: one for all, or any, alone or in runs along a strip."""
    uniform = draw(st.sampled_from((None, None, *LEVELS)))
    if uniform is not None:
        return torch.full_like(w.stored_levels, uniform)
    run = draw(st.sampled_from((1, 1, 2, 3, 5)))
    return random_levels(w, seed)[:, torch.arange(w.stored_levels.shape[1]) // run]


def _at_exact(draw: st.DrawFn, w: PlaneTensor, levels: Tensor) -> Tensor:
    """The levels, with none, some or all of the exact tiles read as such."""
    if w.exact is None:
        return levels
    exact = w.exact.levels()
    chosen = torch.rand(exact.shape, generator=generator(w.rows)) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    return torch.where((exact > 0) & (chosen | (levels > w.stored_levels)), exact, levels)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any number of weights, odd shapes, tiles missing or at any level, every kind of x."""
    seed = draw(st.integers(0, 10**6))
    columns = draw(COLUMNS)
    rows_of_x = draw(ROWS_OF_X)
    group = draw(st.sampled_from((32, 64, 128)))
    maps = draw(st.sampled_from((1, 2, 2, 3, 8)))
    weights, biases = [], []
    for i in range(draw(st.integers(1, 3))):
        n = draw(ROWS)
        reach = draw(st.integers(0, 3))
        w = coded(n, columns, group=group, reach=reach, row_gains=draw(st.booleans()), seed=seed + i).planes
        exact = draw(st.sampled_from((0.0, 0.0, 0.1, 1.0)))
        if exact:
            w = with_exact(w, exact, draw(st.sampled_from(DTYPES)), seed + 50 + i)
        if draw(st.booleans()):
            w = w.kept(_at_exact(draw, w, _levels(draw, w, seed + 10 + i)))
        levels = torch.stack([_at_exact(draw, w, _levels(draw, w, seed + 20 + i + n)) for n in range(maps)])
        weights.append(replace(w, active_levels=levels))
        biases.append(torch.randn(n, generator=generator(seed + 30 + i)) if draw(st.booleans()) else torch.empty(0))
    g = generator(seed + 40)
    x = torch.randn(rows_of_x, columns, generator=g) * 10 ** draw(st.sampled_from((-3, 0, 2)))
    x = x.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(("plain", "transposed", "strided", "three")))
    if layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "strided":
        x = torch.cat([x, x], 1)[:, :columns]
    elif layout == "three":
        x = x.unsqueeze(1).expand(-1, 2, -1)
    count = x.shape[:-1].numel()
    map_of_row = torch.randint(0, maps, (count,), generator=g, dtype=torch.uint8) if draw(st.booleans()) else None
    order = torch.randperm(columns, generator=g) if draw(st.booleans()) else None
    level = torch.tensor([draw(st.sampled_from((4, 8, 16))) for _ in range(maps)], dtype=torch.uint8)
    size = 10.0 ** draw(st.sampled_from((-3, 0, 2)))
    bounds = draw(
        st.sampled_from((None, (-1.0, 2.0), (0.0, 3.0), (-2.5, 0.0), (1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0)))
    )
    input_range = None if bounds is None else torch.tensor(bounds) * size
    return Call(x, weights, biases, level, map_of_row, order, input_range)


def simple(
    rows: int = 40,
    columns: int = 100,
    m: int = 5,
    *,
    level: int = 8,
    group: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Call:
    """One weight of mixed levels, with a bias."""
    w = coded(rows, columns, group=group, row_gains=True, seed=seed).planes
    w = replace(w, active_levels=torch.stack([random_levels(w, seed), random_levels(w, seed + 1)]))
    x = torch.randn(m, columns, generator=generator(seed)).to(dtype)
    bias = torch.randn(rows, generator=generator(seed + 1))
    return Call(x, [w], [bias], torch.full((2,), level, dtype=torch.uint8))
