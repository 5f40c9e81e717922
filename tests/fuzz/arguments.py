"""Random arguments of ops: right ones, and the ways in which an argument can be wrong (`fuzz.op_calls`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.formats.packing import tile_grid
from foveate.planes import PlaneTensor
from tiny import coded, generator, random_levels, with_exact

#: What an op may answer instead of a result. Layouts without kernels (sparse) reach the reference and its errors.
REFUSALS = (
    FoveateError, RuntimeError, IndexError, TypeError, ValueError, OverflowError, MemoryError, NotImplementedError,
)  # fmt: skip
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
_MOST = 2**63 - 1
#: Numbers at the edges of what an int holds, and small ones. Between lie sizes that a machine might really have.
EDGES = (
    -(2**63), -(2**63) + 1, -(2**62), -(2**31), -17, -1, 0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129,
    256, 1000, 1024, 1025, 2**55, 2**56, 2**56 + 1, 2**60, 2**62, _MOST - 1024, _MOST - 15, _MOST - 1, _MOST,
)  # fmt: skip
SHAPES = ((1, 1), (3, 5), (16, 32), (17, 33), (24, 70), (40, 100), (64, 256), (70, 300), (0, 40), (20, 0), (130, 520))


@cache
def _weight(rows: int, columns: int, group: int, kind: int) -> PlaneTensor:
    if not rows * columns:
        return _empty(rows, columns, group)
    w = coded(rows, columns, group=group, reach=kind % 4, row_gains=kind % 2 == 1, seed=kind).planes
    if kind >= 3:
        w = w.kept(random_levels(w, kind))
    if kind in (1, 4):
        w = with_exact(w, 0.3, (torch.float16, torch.float32)[kind // 4], kind)
    levels = [torch.minimum(random_levels(w, kind + seed), w.stored_levels) for seed in (7, 8)]
    if w.exact is not None:
        levels[0] = torch.maximum(levels[0], w.exact.levels())
    return replace(w, active_levels=torch.stack(levels))


def whole(t: Tensor) -> bool:
    """Whether a tensor lies within its storage."""
    if t.layout != torch.strided or t.is_meta:
        return False
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return not t.numel() or (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def _empty(rows: int, columns: int, group: int) -> PlaneTensor:
    none, grid = torch.empty(0, dtype=torch.uint8), tile_grid(rows, columns, group)
    return PlaneTensor(
        planes=(none,) * 5,
        scales=none,
        gain=torch.ones(2, 1, dtype=torch.float16),
        stored_levels=torch.zeros(grid, dtype=torch.uint8),
        tile_offsets=torch.zeros(grid[0], 6, dtype=torch.int64),
        active_levels=torch.zeros(2, *grid, dtype=torch.uint8),
        rows=rows,
        columns=columns,
        group=group,
        reach=0,
        exponent=0,
    )


class Arguments:
    """Makes arguments from a seed and a number."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}:{number}")
        self.g = generator(self.random.getrandbits(31))
        self.wrongs: list[str] = []
        self.has_sparse = self.has_shrunk = False

    def one(self, of: Sequence[Any]) -> Any:
        return of[self.random.randrange(len(of))]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # --- right arguments -------------------------------------------------------------------------------------------

    def weight(self, columns: int | None = None, group: int | None = None) -> PlaneTensor:
        rows, own = self.one(SHAPES)
        return _weight(rows, own if columns is None else columns, group or self.one((32, 64, 128)), self.one(range(6)))

    def floats(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.g) * self.one((1e-30, 1e-3, 1.0, 100.0, 1e30))
        if x.numel() and self.chance(0.2):
            x.view(-1)[self.random.randrange(x.numel())] = self.one((float("nan"), float("inf"), -0.0, 3e38))
        x = x.to(self.one((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
        return x.t().contiguous().t() if x.dim() == 2 and self.chance(0.2) else x

    def leading(self) -> tuple[int, ...]:
        return self.one(((), (0,), (1,), (1,), (2,), (5,), (13,), (40,), (2, 3), (2, 0, 3)))

    def flat(self) -> Tensor:
        n = self.one((0, 1, 2, 31, 32, 33, 64, 100, 1000, 1024, 1025, 5000))
        x = self.floats(n)
        return x.view(-1, 4).t() if n % 4 == 0 and self.chance(0.2) else x

    # --- wrong ones ------------------------------------------------------------------------------------------------

    def wrong(self, args: list[Any]) -> list[Any]:
        """Some arguments exchanged for others."""
        for _ in range(self.one((0, 0, 1, 1, 1, 2, 3))):
            if args:
                i = self.random.randrange(len(args))
                args[i] = self.other(args[i], str(i))
        return args

    def other(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            return self.other_tensor(value, place)
        if isinstance(value, (list, tuple)):
            return self.other_list(list(value), place)
        if isinstance(value, bool) or value is None or isinstance(value, torch.dtype):
            self.wrongs.append(f"{place}: another kind")
            return self.one((None, self.one(DTYPES), 3, self.floats(3), True))
        number = self.one(EDGES) if self.chance(0.7) else value + self.one((-1, 1))
        self.wrongs.append(f"{place}: {number}")
        return float(number) if isinstance(value, float) else number

    def other_list(self, values: list[Any], place: str) -> list[Any]:
        how = self.random.randrange(8)
        if not values or how == 0:
            self.wrongs.append(f"{place}: one more")
            return [*values, self.one(values) if values else self.one((0, 1, torch.empty(0)))]
        i = self.random.randrange(len(values))
        if how == 1:
            self.wrongs.append(f"{place}[{i}]: left out")
            return values[:i] + values[i + 1 :]
        if how == 2 and self.chance(0.3):
            self.wrongs.append(f"{place}: empty")
            return []
        return [self.other(v, f"{place}[{j}]") if j == i else v for j, v in enumerate(values)]

    def other_tensor(self, t: Tensor, place: str) -> Tensor:
        if not whole(t) or t.numel() > 1 << 20:  # torch itself would read beyond its storage, or for hours
            return t
        t = t.clone() if self.chance(0.9) else t.detach()
        ways: list[tuple[str, Callable[[], Tensor]]] = [
            ("dtype", lambda: t.to(self.one(DTYPES))),
            ("cut", lambda: t[..., : max(0, t.shape[-1] - self.one((1, 2, 16)))] if t.dim() else t),
            ("longer", lambda: torch.cat([t, t], -1) if t.dim() else t.expand(3)),
            ("strided", lambda: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t),
            ("transposed", lambda: t.t() if t.dim() == 2 else t.flip(0) if t.dim() else t),
            ("flat", lambda: t.reshape(-1)),
            ("deeper", lambda: t.unsqueeze(self.one((0, -1)))),
            ("empty", lambda: t.new_empty(0)),
            ("a number", lambda: t.reshape(-1)[:1].sum() if t.numel() else t.new_zeros(())),
            ("offset", lambda: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape) if t.numel() else t),
            ("expanded", lambda: t.reshape(-1)[:1].expand(self.one((2, 2**35, 2**45, 2**60))) if t.numel() else t),
            ("broadcast", lambda: t[:1].expand(self.one((1, 7, 2**45)), *t.shape[1:]) if t.dim() and len(t) else t),
            ("huge", lambda: t.new_empty(self.one(((0, 2**62), (2**62, 0), (2**40, 0, 2**20), (0, 2**31, 2**31))))),
            ("random", lambda: self.random_of(t)),
            ("shrunk storage", lambda: self.shrunk(t)),
            ("set", lambda: t.detach().set_(self.random_of(t)[..., :1])),  # type: ignore[arg-type]
            ("resized", lambda: t.contiguous().resize_(self.one(((0,), (1,), (3, 2), (2, 2, 2), tuple(t.shape))))),
            ("negative view", lambda: torch._neg_view(t) if t.dtype != torch.bool else t),
            ("gradient", lambda: t.detach().requires_grad_() if t.is_floating_point() else t),
            ("meta", lambda: t.to("meta")),
            ("sparse", lambda: self.sparse(t)),
            ("parameter", lambda: torch.nn.Parameter(t, requires_grad=False)),
        ]
        name, way = self.one(ways)
        try:
            made = way()
        except REFUSALS:  # torch does not make such a tensor
            return t
        self.wrongs.append(f"{place}: {name} {made.dtype} {tuple(made.shape)}")
        return made

    def random_of(self, t: Tensor) -> Tensor:
        if t.dtype == torch.int64 and self.chance(0.5):
            return torch.tensor([self.one(EDGES) for _ in range(t.numel())], dtype=torch.int64).view(t.shape)
        if t.is_floating_point() or t.is_complex():
            return torch.randn(t.shape, generator=self.g).to(t.dtype) * 1e38
        return torch.randint(0, 256, t.shape, generator=self.g).to(t.dtype)

    def sparse(self, t: Tensor) -> Tensor:
        # a sparse argument makes the reference run, whose torch would read beyond a storage that was made smaller
        if self.has_shrunk or not t.dim():
            return t
        self.has_sparse = True
        return t.to_sparse()

    def shrunk(self, t: Tensor) -> Tensor:
        if self.has_sparse:
            return t
        self.has_shrunk = True
        t = t.contiguous().clone()
        size = t.untyped_storage().nbytes()
        t.untyped_storage().resize_(self.one((0, size // 2, max(0, size - 1))))
        return t
