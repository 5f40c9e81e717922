"""How close products with few rows of x come to the memory's bandwidth, and how they compare with dense layers.

x is multiplied with a set of equal weights far larger than the caches, one weight after the other, so that every weight
comes from memory. The share of the bandwidth that a product reaches is its bytes of planes and scales, over its time,
over the read bandwidth of the same memory just before and after. Two reads and the product between them take about 20
ms, and each such triple gives one ratio. The figures are `bandwidth_ratio_b<level>` for one row of x,
`m<rows>_b<level>` for more rows, and `bandwidth_ratio_b4_avx2` with the kernels forced to AVX2.

The other figures are ratios of times for one row of x:

    time_ratio_b2_over_b8  2 bits over 8 bits
    mixed_tiles_overhead   a random mix of levels, over the mean of the pure levels, weighted by their shares
    zero_tiles_ratio       4 bits with a random half of the tiles at level 0 and not stored, over 4 bits everywhere
    zero_tags_ratio        the same with every tile stored at 4 bits, as in a live model after a switch

`foveate.bench.shared.dense` has the comparison with torch's own layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foveate.bench.limits.bandwidth import Blocks, Loop, fastest_loop
from foveate.bench.shared import dense
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.formats.levels import NESTED_LEVELS
from foveate.formats.packing import tile_grid
from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.threads import threads
from foveate.memory.available import free_memory
from foveate.planes import PlaneTensor, gathered, linear
from foveate.progress import track

_NO_BIAS = torch.empty(0)
#: The numbers of rows of x for every level, and further numbers for 4 bits.
ROWS_OF_X = (1, 4)
MORE_ROWS_OF_X = (2, 8)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        width: the rows and the columns of the weights.
        group: the number of inputs in a group.
        threads: the number of threads, for kernels and bandwidth alike.
        set_bytes: the bytes of each set of weights, far beyond the last cache; less where memory is short.
        rounds: the number of interleaved rounds, of which the median is reported.
        grid: the comparison with dense layers.
    """

    width: int = 4096
    group: int = 128
    threads: int = 2
    set_bytes: int = 256 << 20
    rounds: int = 61
    grid: dense.Grid = field(default_factory=dense.Grid)


@dataclass(frozen=True, eq=False)
class Copies:
    """Equal weights side by side in memory.

    Attributes:
        weights: the weights, in blocks of memory that no other set shares.
        bytes_each: the bytes of planes and scales of one weight.
    """

    weights: list[PlaneTensor]
    bytes_each: int

    @classmethod
    def of(cls, weight: PlaneTensor, set_bytes: int) -> Copies:
        """As many copies as fill `set_bytes`."""
        each = sum(p.numel() for p in weight.planes) + weight.scales.numel()
        return cls(gathered([weight] * max(2, -(-set_bytes // each))), each)

    def read_at(self, level_tiles: Tensor) -> Copies:
        """The same memory, read at other active levels (uint8 [NT, G]); `bytes_each` still counts what is stored."""
        active_levels = level_tiles.expand(2, -1, -1).clone()
        return replace(self, weights=[replace(w, active_levels=active_levels) for w in self.weights])

    def blocks(self) -> list[Tensor]:
        """The memory of the weights: one block of scales, and one block for each plane."""
        parts = [[w.scales.view(torch.uint8) for w in self.weights]]
        parts += [list(planes) for planes in zip(*(w.planes for w in self.weights), strict=True)]
        return [_span(p) for p in parts if p[0].numel()]

    def seconds(self, x_MK: Tensor) -> float:
        """The mean time of a product."""
        level = torch.tensor([8, 8], dtype=torch.uint8)
        started = time.perf_counter()
        for weight in self.weights:
            linear(x_MK, [weight], [_NO_BIAS], level)
        return (time.perf_counter() - started) / len(self.weights)


def _span(parts: list[Tensor]) -> Tensor:
    size = parts[-1].data_ptr() + parts[-1].numel() - parts[0].data_ptr()
    return torch.as_strided(parts[0], (size,), (1,))


@dataclass(frozen=True, eq=False)
class Run:
    """One product that is timed in every round.

    Attributes:
        name: the name in its figures.
        copies: the weights.
        rows_of_x: the number of rows of x.
        isa: the instruction set that is forced; empty for the one in use.
    """

    name: str
    copies: Copies
    rows_of_x: int = 1
    isa: str = ""

    def seconds(self, x_MK: Tensor) -> float:
        """The mean time of a product."""
        with instructions(self.isa):
            return self.copies.seconds(x_MK[: self.rows_of_x])


@contextmanager
def instructions(isa: str) -> Iterator[None]:
    """Force an instruction set on the kernels for the length of a block; an empty name leaves them as they are.

    Raises:
        RuntimeError: this machine does not have the instruction set.
    """
    before = torch.ops.foveate._cpu_isa("")
    torch.ops.foveate._cpu_isa(isa)
    try:
        yield
    finally:
        torch.ops.foveate._cpu_isa(before)


def _has_avx2() -> bool:
    try:
        with instructions("avx2"):
            return True
    except RuntimeError:  # this machine does not have AVX2
        return False


def _runs(sizes: Sizes) -> list[list[Run]]:
    """The products that are timed, grouped by their memory; products that are compared are close together."""
    shape = (sizes.width, sizes.width)
    weight = dense.random_planes(shape, sizes.group)
    grid = tile_grid(*shape, sizes.group)
    generator = torch.Generator().manual_seed(1)
    mix = torch.tensor(NESTED_LEVELS, dtype=torch.uint8)[
        torch.randint(0, len(NESTED_LEVELS), grid, generator=generator)
    ]
    half = 4 * torch.randint(0, 2, grid, dtype=torch.uint8, generator=generator)
    set_bytes = min(sizes.set_bytes, free_memory() // 3 // (len(NESTED_LEVELS) + 2))

    def level(level: int) -> list[Run]:
        copies = Copies.of(weight.kept(torch.full(grid, level, dtype=torch.uint8)), set_bytes)
        return [Run(f"b{level}" if m == 1 else f"m{m}_b{level}", copies, m) for m in ROWS_OF_X]

    four = level(4)
    copies = four[0].copies
    four.insert(1, Run("zero_tags", copies.read_at(half)))
    four += [Run(f"m{m}_b4", copies, m) for m in MORE_ROWS_OF_X]
    if _has_avx2():
        four.append(Run("b4_avx2", copies, isa="avx2"))
    zero = [Run("zero_tiles", Copies.of(weight.kept(half), set_bytes))]
    mixed = [Run("mixed", Copies.of(weight.kept(mix), set_bytes))]
    return [level(8), level(2), level(3), mixed, level(6), four, zero]


def measure(sizes: Sizes | None = None) -> Measured:
    """Measure every level and mixes of levels in interleaved rounds; then compare with dense layers."""
    sizes = sizes or Sizes()
    ensure_loaded()
    with BackgroundLoad() as background, threads(sizes.threads), torch.inference_mode():
        few = _few_rows(sizes)
        beside = dense.measure(sizes.grid)
    notes = [*few.notes, background.note(), *beside.notes]
    return Measured({**few.figures, **beside.figures}, [*few.rounds, *beside.rounds], notes)


def _few_rows(sizes: Sizes) -> Measured:
    sets = _runs(sizes)
    x_MK = torch.randn(max(*ROWS_OF_X, *MORE_ROWS_OF_X), sizes.width)
    loop = fastest_loop(Blocks(sets[0][0].copies.blocks()), min(31, sizes.rounds))
    _round(sets, x_MK, loop)  # not counted: pages, clocks and threads warm up
    rounds = [_round(sets, x_MK, loop) for _ in track(range(sizes.rounds), "products with few rows of x")]
    runs = {run.name: run for runs in sets for run in runs}
    figures = _figures(runs, rounds)
    streams, ahead, cache = loop
    prefetch = f"prefetching {ahead} cache lines ahead into cache {cache}" if ahead else "prefetching nothing"
    notes = (
        f"{sizes.threads} threads; {sizes.width} x {sizes.width}, group {sizes.group}, cold; the bandwidth is that of "
        f"{streams} streams a thread, {prefetch}, median {figures['read_bandwidth_gb_s']:.1f} GB/s",
        "bytes of planes and scales of a weight: " + _listed({r[0].name: r[0].copies.bytes_each for r in sets}),
        "copies of each weight: " + _listed({r[0].name: len(r[0].copies.weights) for r in sets}),
    )
    return Measured(figures, rounds, notes)


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def _round(sets: Sequence[Sequence[Run]], x_MK: Tensor, loop: Loop) -> dict[str, Any]:
    """The time of each run, and the harmonic mean of the bandwidths just before and after it."""
    found: dict[str, Any] = {}
    for runs in sets:
        blocks = Blocks(runs[0].copies.blocks())
        before = blocks.bandwidth(loop)
        for run in runs:
            found[f"seconds_{run.name}"] = run.seconds(x_MK)
            after = blocks.bandwidth(loop)
            found[f"bandwidth_{run.name}"] = 2 / (1 / before + 1 / after)
            before = after
    return found


def _figures(runs: dict[str, Run], rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    def over_rounds(value: Any) -> float:
        return float(median(value(r) for r in rounds))

    def share(name: str) -> float:
        each = runs[name].copies.bytes_each
        return over_rounds(lambda r: each / r[f"seconds_{name}"] / r[f"bandwidth_{name}"])

    def times(name: str, other: str) -> float:
        return over_rounds(lambda r: r[f"seconds_{name}"] / r[f"seconds_{other}"])

    figures = {f"bandwidth_ratio_{name}": share(name) for name in runs if name.startswith("b")}
    figures |= {name: share(name) for name in sorted(runs) if name.startswith("m") and name != "mixed"}
    figures["time_ratio_b2_over_b8"] = times("b2", "b8")
    tiles = runs["mixed"].copies.weights[0].stored_levels
    shares = {level: float((tiles == level).float().mean()) for level in NESTED_LEVELS}
    figures["mixed_tiles_overhead"] = over_rounds(
        lambda r: r["seconds_mixed"] / sum(share * r[f"seconds_b{level}"] for level, share in shares.items())
    )
    figures["zero_tiles_ratio"] = times("zero_tiles", "b4")
    figures["zero_tags_ratio"] = times("zero_tags", "b4")
    figures["read_bandwidth_gb_s"] = over_rounds(lambda r: r["bandwidth_b8"] / 1e9)
    for name in runs:
        figures[f"microseconds_{name}"] = over_rounds(lambda r, name=name: r[f"seconds_{name}"] * 1e6)
    return figures
