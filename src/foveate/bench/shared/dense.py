"""Products with planes compared with torch's linear layers: float32, bf16 and dynamic int8.

For every shape and every number of rows of x, all contenders compute in turn, round after round. Each contender goes
through copies of its weight that exceed the caches, as often as takes a few milliseconds. A ratio compares two times of
one round, and the median over rounds is reported.

`worst_vs_dense` is the greatest of these ratios: planes with float32 x at any level, over the faster of `nn.Linear` in
float32 (with float32 x) and in bf16 (with bf16 x). `m256_vs_int8` is the ratio of the slowest level over torch's
dynamic int8 layer, for 256 rows of x.

Shapes are (rows, columns) of the weight; M is the number of rows of x.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.shared.result import Measured
from foveate.formats.levels import GAINED_LEVELS, NESTED_LEVELS
from foveate.nn.modules import PlaneLinear
from foveate.nn.weight import PlaneWeight
from foveate.planes import PlaneTensor, from_codes, gathered
from foveate.progress import track

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: A dense layer slower than the other by more than this factor is left out after the warm-up.
TOO_SLOW = 2.0
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """The shapes and sizes that are compared.

    Attributes:
        shapes: rows and columns of the weights.
        rows_of_x: the values of M.
        int8_at: the shape and the M at which dynamic int8 is compared too.
        cold_bytes: the bytes of each contender's copies, which exceed the last cache.
        least_seconds: a contender computes at least this long in a round, or once.
        rounds: the number of interleaved rounds, of which the median is reported.
        group: the number of inputs in a group.
    """

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 11008), (11008, 4096), (768, 3072), (3072, 768))
    rows_of_x: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    int8_at: tuple[tuple[int, int], int] = ((4096, 4096), 256)
    cold_bytes: int = 128 << 20
    least_seconds: float = 0.004
    rounds: int = 15
    group: int = 128


def random_planes(shape: tuple[int, int], group: int) -> PlaneTensor:
    """A weight of random codes with every plane."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape

    def codes() -> Tensor:
        return torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)

    scales = (torch.rand(2, rows, -(-columns // group), generator=generator) * 0.01).half()
    return from_codes(
        codes(), codes(), scales[0], scales[1], torch.ones(len(GAINED_LEVELS), 1).half(), group=group, reach=0
    )


class Contender:
    """Copies of one layer, which are used one after the other."""

    def __init__(self, layers: Sequence[Layer], x_MK: Tensor) -> None:
        self._layers: Iterator[Layer] = cycle(layers)
        self._x_MK = x_MK

    def seconds(self, rows: int, calls: int) -> float:
        """The mean time of a call with the first `rows` rows of x."""
        x_MK = self._x_MK[:rows]
        layers = [next(self._layers) for _ in range(calls)]
        started = time.perf_counter()
        for layer in layers:
            layer(x_MK)
        return (time.perf_counter() - started) / calls


def _copies(bytes_each: int, grid: Grid) -> int:
    return max(1, -(-grid.cold_bytes // bytes_each))


def _dense_layers(shape: tuple[int, int], dtype: torch.dtype, grid: Grid) -> list[Layer]:
    rows, columns = shape
    first = nn.Linear(columns, rows, bias=False, dtype=dtype).requires_grad_(False)
    return [first, *(deepcopy(first) for _ in range(_copies(rows * columns * dtype.itemsize, grid) - 1))]


def _plane_layers(weight: PlaneTensor, level: int, grid: Grid) -> list[Layer]:
    kept = weight.kept(torch.full_like(weight.stored_levels, level))
    copies = gathered([kept] * _copies(sum(p.numel() for p in kept.planes), grid))
    return [PlaneLinear(PlaneWeight(copy, torch.float32)) for copy in copies]


def _int8_layers(shape: tuple[int, int], grid: Grid) -> list[Layer]:
    rows, columns = shape
    dense = nn.Sequential(nn.Linear(columns, rows, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantize_dynamic is deprecated
        return [
            torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)[0]
            for _ in range(_copies(rows * columns, grid))
        ]


def _contenders(shape: tuple[int, int], grid: Grid) -> dict[str, Contender]:
    x_MK = torch.randn(max(grid.rows_of_x), shape[1])
    found = {name: Contender(_dense_layers(shape, dtype, grid), x_MK.to(dtype)) for name, dtype in DENSE.items()}
    weight = random_planes(shape, grid.group)
    for level in NESTED_LEVELS:
        found[f"b{level}"] = Contender(_plane_layers(weight, level, grid), x_MK)
    if shape == grid.int8_at[0]:
        found["int8"] = Contender(_int8_layers(shape, grid), x_MK)
    return found


def _calls(contenders: dict[str, Contender], rows: int, grid: Grid) -> dict[str, int]:
    """The contenders at this M, and the number of calls of each in a round."""
    names = [n for n in contenders if n != "int8" or rows == grid.int8_at[1]]
    warm = {name: min(contenders[name].seconds(rows, 1) for _ in range(3)) for name in names}
    best = min(warm[name] for name in DENSE)
    return {
        name: max(1, round(grid.least_seconds / seconds))
        for name, seconds in warm.items()
        if name not in DENSE or seconds <= TOO_SLOW * best
    }


def _one_shape(shape: tuple[int, int], grid: Grid) -> list[dict[str, Any]]:
    contenders = _contenders(shape, grid)
    calls = {rows: _calls(contenders, rows, grid) for rows in grid.rows_of_x}
    seconds: dict[int, dict[str, list[float]]] = {rows: {n: [] for n in calls[rows]} for rows in grid.rows_of_x}
    for _ in track(range(grid.rounds), f"{shape[0]} x {shape[1]} beside dense layers"):
        for rows, names in calls.items():
            for name, count in names.items():
                seconds[rows][name].append(contenders[name].seconds(rows, count))
    return [entry(shape, rows, times) for rows, times in seconds.items()]


def entry(shape: tuple[int, int], rows: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """The result at one shape and M: the times by contender and round, and the median ratios."""
    dense = [min(pair) for pair in zip(*(times[name] for name in DENSE if name in times), strict=True)]

    def over(base: Sequence[float]) -> dict[str, float]:
        return {
            f"b{level}": median(ours / other for ours, other in zip(times[f"b{level}"], base, strict=True))
            for level in NESTED_LEVELS
        }

    entry = {"shape": list(shape), "rows_of_x": rows, "seconds": times, "over_dense": over(dense)}
    if "int8" in times:
        entry["over_int8"] = over(times["int8"])
    return entry


def measure(grid: Grid | None = None) -> Measured:
    """Compare the contenders at every shape and M."""
    grid = grid or Grid()
    with torch.inference_mode():
        entries = [entry for shape in grid.shapes for entry in _one_shape(shape, grid)]
    figures = {"worst_vs_dense": max(max(e["over_dense"].values()) for e in entries)}
    int8 = [max(e["over_int8"].values()) for e in entries if "over_int8" in e]
    if int8:
        figures[f"m{grid.int8_at[1]}_vs_int8"] = max(int8)
    return Measured(
        figures, entries, (f"time over that of the faster of float32 and bf16 nn.Linear:\n{table(entries)}",)
    )


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The ratios over dense layers as text, with a line for each shape and level."""
    lines = []
    for shape in dict.fromkeys(tuple(e["shape"]) for e in entries):
        here = [e for e in entries if tuple(e["shape"]) == shape]
        lines.append(f"{shape[0]} x {shape[1]}, M = " + " ".join(f"{e['rows_of_x']:5}" for e in here))
        for level in NESTED_LEVELS:
            lines.append(f"  {level} bits " + " ".join(f"{e['over_dense'][f'b{level}']:.3f}" for e in here))
    return "\n".join(lines)
