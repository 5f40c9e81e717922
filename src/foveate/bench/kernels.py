"""How close one-token products come to the memory's own speed.

A set of equal weights far larger than the caches is multiplied with one row of x, one weight after the other, so that
every weight comes from memory. Bytes of planes and scales over time, over the read bandwidth of the same memory
measured just before and after, is the share of the machine's bandwidth that the product reaches.

`bandwidth_ratio_b<level>` and `m4_b4` are such shares, for one row of x and for four. The rest are ratios of times:
2 bits over 8; a random mix of levels over the mean of the pure levels, weighted as the mix has them; and 4 bits with
half the tiles zero over 4 bits with none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from foveate.bench.bandwidth import bandwidth, fastest_variant
from foveate.bench.result import Measured
from foveate.formats.levels import GAINED_LEVELS, NESTED_LEVELS
from foveate.formats.packing import tile_grid
from foveate.kernels.dispatch import ensure_loaded
from foveate.kernels.threads import threads
from foveate.planes import PlaneTensor, from_codes, gathered, linear

_NO_BIAS = torch.empty(0)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        width: rows and columns of the weights.
        group: inputs a group.
        threads: for kernels and bandwidth alike.
        set_bytes: bytes of each set of weights, far beyond the last cache; less where memory is short.
        rounds: interleaved rounds, of which the median is reported.
    """

    width: int = 4096
    group: int = 128
    threads: int = 2
    set_bytes: int = 512 << 20
    rounds: int = 15


@dataclass(frozen=True, eq=False)
class Copies:
    """Equal weights side by side in memory.

    Attributes:
        weights: on blocks of memory that no other set shares.
        bytes_each: bytes of planes and scales of one.
    """

    weights: list[PlaneTensor]
    bytes_each: int

    @classmethod
    def of(cls, weight: PlaneTensor, set_bytes: int) -> Copies:
        """As many copies as fill `set_bytes`."""
        each = sum(p.numel() for p in weight.planes) + weight.scales.numel() * 2
        return cls(gathered([weight] * max(2, -(-set_bytes // each))), each)

    def blocks(self) -> list[Tensor]:
        """The memory that the weights lie in, a block for the scales and for each plane."""
        parts = [[w.scales.view(torch.uint8) for w in self.weights]]
        parts += [list(planes) for planes in zip(*(w.planes for w in self.weights), strict=True)]
        return [_span(p) for p in parts if p[0].numel()]

    def seconds(self, x_MK: Tensor) -> float:
        """Mean time of a product."""
        level = torch.tensor([8, 8], dtype=torch.uint8)
        started = time.perf_counter()
        for weight in self.weights:
            linear(x_MK, [weight], [_NO_BIAS], level)
        return (time.perf_counter() - started) / len(self.weights)


def _span(parts: list[Tensor]) -> Tensor:
    size = parts[-1].data_ptr() + parts[-1].numel() - parts[0].data_ptr()
    return torch.as_strided(parts[0], (size,), (1,))


def random_weight(width: int, group: int) -> PlaneTensor:
    """A weight of random codes, every plane of it."""
    generator = torch.Generator().manual_seed(0)
    groups = -(-width // group)

    def codes() -> Tensor:
        return torch.randint(0, 16, (width, width), dtype=torch.uint8, generator=generator)

    scales = (torch.rand(2, width, groups, generator=generator) * 0.01).half()
    return from_codes(
        codes(), codes(), scales[0], scales[1], torch.ones(len(GAINED_LEVELS), 1).half(), group=group, reach=0
    )


def _sets(sizes: Sizes) -> dict[str, Copies]:
    weight = random_weight(sizes.width, sizes.group)
    grid = tile_grid(sizes.width, sizes.width, sizes.group)
    generator = torch.Generator().manual_seed(1)
    tiles = {f"b{level}": torch.full(grid, level, dtype=torch.uint8) for level in NESTED_LEVELS}
    choice = torch.randint(0, len(NESTED_LEVELS), grid, generator=generator)
    tiles["mixed"] = torch.tensor(NESTED_LEVELS, dtype=torch.uint8)[choice]
    tiles["half_zero"] = tiles["b4"] * torch.randint(0, 2, grid, dtype=torch.uint8, generator=generator)
    room = psutil.virtual_memory().available // 3 // len(tiles)
    return {name: Copies.of(weight.kept(levels), min(sizes.set_bytes, room)) for name, levels in tiles.items()}


def measure(sizes: Sizes | None = None) -> Measured:
    """Measure every level, and mixes of them, in interleaved rounds."""
    sizes = sizes or Sizes()
    ensure_loaded()
    with threads(sizes.threads), torch.inference_mode():
        sets = _sets(sizes)
        x_MK = torch.randn(4, sizes.width)
        variant = fastest_variant(sets["b8"].blocks())
        rounds: list[dict[str, Any]] = []
        _round(sets, x_MK, variant)  # not counted: pages, clocks and threads warm up
        for _ in range(sizes.rounds):
            rounds.append(_round(sets, x_MK, variant))
    per_token = {name: s.bytes_each for name, s in sets.items()}
    notes = (
        f"{sizes.threads} threads; {sizes.width} x {sizes.width}, group {sizes.group}, cold; "
        + f"the bandwidth is that of {variant[0]} streams a thread, prefetching {variant[1]} cache lines ahead, "
        + f"median {median(r['bandwidth_b8'] for r in rounds) / 1e9:.1f} GB/s",
        f"bytes of planes and scales a product: {per_token}",
        f"copies of each weight: { {name: len(s.weights) for name, s in sets.items()} }",
    )
    return Measured(_figures(sizes, sets, rounds), rounds, notes)


def _round(sets: dict[str, Copies], x_MK: Tensor, variant: tuple[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, copies in sets.items():
        before = bandwidth(copies.blocks(), variant)
        found[f"seconds_{name}"] = copies.seconds(x_MK[:1])
        found[f"bandwidth_{name}"] = (before + bandwidth(copies.blocks(), variant)) / 2
        if name == "b4":
            found["seconds_m4_b4"] = copies.seconds(x_MK)
    return found


def _figures(sizes: Sizes, sets: dict[str, Copies], rounds: list[dict[str, Any]]) -> dict[str, float]:
    def over_rounds(value: Any) -> float:
        return float(median(value(r) for r in rounds))

    figures = {}
    for level in NESTED_LEVELS:
        key, each = f"b{level}", sets[f"b{level}"].bytes_each
        figures[f"bandwidth_ratio_{key}"] = over_rounds(
            lambda r, key=key, each=each: each / r[f"seconds_{key}"] / r[f"bandwidth_{key}"]
        )
    four = sets["b4"].bytes_each
    figures["m4_b4"] = over_rounds(lambda r: four / r["seconds_m4_b4"] / r["bandwidth_b4"])
    figures["time_ratio_b2_over_b8"] = over_rounds(lambda r: r["seconds_b2"] / r["seconds_b8"])
    tiles = sets["mixed"].weights[0].resident
    shares = {level: float((tiles == level).float().mean()) for level in NESTED_LEVELS}
    figures["mixed_tiles_overhead"] = over_rounds(
        lambda r: r["seconds_mixed"] / sum(share * r[f"seconds_b{level}"] for level, share in shares.items())
    )
    figures["zero_tiles_ratio"] = over_rounds(lambda r: r["seconds_half_zero"] / r["seconds_b4"])
    figures["read_bandwidth_gb_s"] = over_rounds(lambda r: r["bandwidth_b8"] / 1e9)
    for level in NESTED_LEVELS:
        figures[f"microseconds_b{level}"] = over_rounds(lambda r, level=level: r[f"seconds_b{level}"] * 1e6)
    return figures
