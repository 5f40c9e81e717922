"""What it costs that inputs choose: the time of a fused group's product with the decision over without.

Two weights that share an input (gate and up) are multiplied with one row of x, as in decoding, from sets of weights far
larger than the caches. The decision reads `STRIPS` strips of each weight at both of its maps. The threshold makes every
row read the higher map, so that the product without the decision reads the same levels:

    overhead_n<N>       time with the decision over the time without, the median of interleaved rounds
    overhead_best_n<N>  the same of the fastest call of each, which a busy machine disturbs less

`python -m benchmarks inputs` of the repository measures what choosing gains on real models.

Legend: N rows and columns of a weight, M rows of x.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foveate.bench.shared.random_model import random_planes
from foveate.bench.shared.result import Measured
from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.threads import threads
from foveate.planes import PlaneTensor, gathered

STRIPS = 4
_WEIGHTS = 2


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        widths: N.
        set_bytes: bytes of the planes of each set of weights.
        rounds: interleaved rounds.
        threads: of the kernels.
    """

    widths: tuple[int, ...] = (1024, 4096)
    set_bytes: int = 192 << 20
    rounds: int = 31
    threads: int = 2


DEFAULT_SIZES = Sizes()


def measure(sizes: Sizes = DEFAULT_SIZES) -> Measured:
    """Measure on this machine; the sizes are for tests."""
    ensure_loaded()
    figures: dict[str, float] = {}
    rounds: list[dict[str, Any]] = []
    with threads(sizes.threads):
        for width in sizes.widths:
            planes = _levelled(width)
            pairs = _seconds(planes, sizes)
            rounds.append({"width": width, "seconds": pairs})
            figures[f"overhead_n{width}"] = median(decided / plain for decided, plain in pairs)
            figures[f"overhead_best_n{width}"] = min(d for d, _ in pairs) / min(p for _, p in pairs)
    return Measured(figures, rounds)


def _levelled(width: int) -> PlaneTensor:
    """A weight of random codes. Map 0 has 6 bits in one strip of four and 4 bits elsewhere, map 1 has 4 bits and 3."""
    planes = random_planes(width, width, torch.Generator().manual_seed(0))
    strips = torch.arange(planes.grid[0]) % 4 == 0
    levels = torch.stack([torch.where(strips, 6, 4), torch.where(strips, 4, 3)]).to(torch.uint8)
    return replace(planes, active_levels=levels[:, :, None].repeat(1, 1, planes.grid[1]))


class _Calls:
    """Products of pairs of weights by handle, where rows read the pair `pair` of maps."""

    def __init__(self, weights: list[PlaneTensor], pair: tuple[int, int]) -> None:
        ops = torch.ops.foveate
        tiles = [w.stored_levels.numel() for w in weights]
        self._book: Tensor = ops.generation_book(torch.empty(0), tiles, 1)
        levels = torch.cat([w.active_levels.flatten(1) for w in weights], 1)
        strips = torch.linspace(0, weights[0].grid[0] - 1, STRIPS).long().repeat(len(weights))
        choices = [
            torch.tensor([[1, 0]], dtype=torch.uint8),
            torch.full((1, len(weights)), -1.0),
            torch.arange(0, STRIPS * len(weights) + 1, STRIPS)[None],
            strips,
            torch.ones(len(strips), 16),
            torch.zeros(1, len(weights), 2, dtype=torch.int64),
        ]
        inputs = torch.full((2, 1), 8, dtype=torch.uint8)
        ops.publish(self._book, levels, inputs, torch.zeros(2), torch.tensor([pair], dtype=torch.uint8), choices)
        level, limits = torch.full((1,), 8, dtype=torch.uint8), torch.zeros(2)
        self._rows = [weights[0].rows] * _WEIGHTS
        self._handles = [
            ops.plane_handle(
                [t for w in some for t in w.tensors],
                [n for w in some for n in w.geometry],
                [level] * _WEIGHTS,
                [limits] * _WEIGHTS,
                list(range(first, first + _WEIGHTS)),
                [0] * _WEIGHTS,
            )
            for first, some in ((i, weights[i : i + _WEIGHTS]) for i in range(0, len(weights), _WEIGHTS))
        ]

    def seconds(self, x: Tensor) -> float:
        """The mean time of a call."""
        started = time.perf_counter()
        for handle in self._handles:
            torch.ops.foveate.plane_linear_by_handle(x, handle, self._book, None, [], self._rows)
        return (time.perf_counter() - started) / len(self._handles)


def _seconds(planes: PlaneTensor, sizes: Sizes) -> list[tuple[float, float]]:
    """The time of a call with the decision and without it, in each round."""
    each = sum(p.numel() for p in planes.planes)
    count = max(1, round(sizes.set_bytes / each / _WEIGHTS)) * _WEIGHTS
    weights = [replace(w, active_levels=planes.active_levels) for w in gathered([planes] * count)]
    with_decision, without = _Calls(weights, (1, 0)), _Calls(weights, (0, 0))
    x = torch.randn(1, planes.columns, generator=torch.Generator().manual_seed(1))
    for calls in (with_decision, without):
        calls.seconds(x)
    return [(with_decision.seconds(x), without.seconds(x)) for _ in range(sizes.rounds)]


def spearman(a_M: Tensor, b_M: Tensor) -> float:
    """Spearman's rank correlation of two series; 1 where one of them is constant."""
    ranks = [t.double().argsort().argsort().double() for t in (a_M, b_M)]
    deviations = [r - r.mean() for r in ranks]
    size = float((deviations[0].square().sum() * deviations[1].square().sum()).sqrt())
    return float((deviations[0] * deviations[1]).sum()) / size if size > 0 else 1.0
