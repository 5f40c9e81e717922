"""Random calls of every op: right ones, and ones that are wrong in a few of their arguments.

A call is made of a seed and its number alone, so that any of them can be made again. Wrong means: of another dtype,
shape or layout, empty, as large as 2^63, sliced, expanded, with its storage made smaller, with other values, a tensor
missing or twice. Of handles also: tensors that were exchanged after the handle was made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foveate.formats.packing import tile_grid
from foveate.planes import PlaneTensor
from tiny import LEVELS, coded, generator, random_levels

#: What an op may answer instead of a result.
REFUSALS = (RuntimeError, IndexError, TypeError, ValueError, OverflowError, MemoryError, NotImplementedError)
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


@dataclass(frozen=True)
class OpCall:
    """One call.

    Attributes:
        op: the op's name.
        wrongs: what was changed of a right call.
        run: makes the call.
    """

    op: str
    wrongs: tuple[str, ...]
    run: Callable[[], Any]


@cache
def _weight(rows: int, columns: int, group: int, kind: int) -> PlaneTensor:
    if not rows * columns:
        return _empty(rows, columns, group)
    w = coded(rows, columns, group=group, reach=kind % 3, row_gains=kind % 2 == 1, seed=kind).planes
    if kind >= 3:
        w = w.kept(random_levels(w, kind))
    levels = [torch.minimum(random_levels(w, kind + seed), w.stored_levels) for seed in (7, 8)]
    return replace(w, active_levels=torch.stack(levels))


def _whole(t: Tensor) -> bool:
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


class _Maker:
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
        if not _whole(t) or t.numel() > 1 << 20:  # torch itself would read beyond its storage, or for hours
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

    # --- the ops ---------------------------------------------------------------------------------------------------

    def plane_linear(self, op: str) -> OpCall:
        first = self.weight()
        same = [first] + [self.weight(first.columns, first.group) for _ in range(self.one((0, 0, 1, 2)))]
        shape = self.leading()
        count = torch.Size(shape).numel()
        maps = self.pairs(count) if self.chance(0.3) else None
        order = torch.randperm(first.columns, generator=self.g) if self.chance(0.3) else None
        level = torch.tensor([self.one((4, 8, 8, 16, 32)) for _ in range(2)], dtype=torch.uint8)
        args: list[Any] = [
            self.floats(*shape, first.columns),
            [t for w in same for t in w.tensors],
            [self.floats(w.rows).float() if self.chance(0.5) else torch.empty(0) for w in same],
            [n for w in same for n in w.geometry],
            level,
            maps,
            order,
            torch.tensor([-1.0, 2.0]) * self.one((0.0, 1.0, 1e30)) if self.chance(0.4) else None,
        ]
        return self.done(op, args)

    def by_handle(self) -> OpCall:
        first = self.weight()
        same = [first] + [self.weight(first.columns, first.group) for _ in range(self.one((0, 0, 1, 2)))]
        tensors = [t.clone() for w in same for t in w.tensors]
        levels = [torch.full((2,), self.one((4, 8, 16, 32)), dtype=torch.uint8) for _ in same]
        ranges = [torch.tensor([-1.0, 1.0]) * self.one((0.0, 1.0)) for _ in same] if self.chance(0.7) else []
        placed = self.chance(0.5)
        places = [self.one((i, i, i, 3, 10**6)) for i in range(len(same))] if placed else []
        inputs = [self.one((0, 0, 1, 5)) for _ in same] if placed else []
        made = [tensors, [n for w in same for n in w.geometry], levels, ranges, places, inputs]
        if self.chance(0.15):
            return self.done("plane_handle", made)
        handle = torch.ops.foveate.plane_handle(*made)
        for _ in range(self.one((0, 1, 1, 2))):
            kind, held = self.one((("weight", tensors), ("level", levels), ("level", levels), ("range", ranges)))
            if held:
                self.exchange(self.one(held), kind)
        if self.chance(0.1):
            self.exchange(handle, "handle")
        if self.chance(0.05) and handle.numel() == 1 and _whole(handle):
            handle = handle.clone()
            self.wrongs.append("a copy of a handle that is gone")
        biases = [self.floats(w.rows).float() for w in same] if self.chance(0.5) else []
        x = self.floats(*self.leading(), first.columns)
        reads = self.reads([w.stored_levels.numel() for w in same]) if placed and self.chance(0.8) else None
        owners = self.owners(x.shape[:-1].numel()) if self.chance(0.2) else None
        args = [x, handle, reads, owners, biases, [w.rows for w in same]]
        if self.chance(0.5):
            args = self.wrong(args)
        return self.done("plane_linear_by_handle", args, wrong=False)

    def exchange(self, t: Tensor, kind: str) -> None:
        """Change a tensor that a handle holds."""
        ways: list[tuple[str, Callable[[], Any]]] = [
            ("resize_", lambda: t.resize_(self.one(((0,), (1,), (5,), (2, 2), (1, 1, 3), (2**20,))))),
            ("set_", lambda: t.set_(self.other_tensor(t, kind))),  # type: ignore[arg-type]
            ("data", lambda: setattr(t, "data", self.other_tensor(t, kind))),
            ("storage", lambda: t.untyped_storage().resize_(self.one((0, 1, t.untyped_storage().nbytes() // 2)))),
            ("values", lambda: t.copy_(self.random_of(t))),
            ("moved", lambda: t.share_memory_()),
            ("transposed", lambda: t.t_() if t.dim() == 2 else None),
            ("strided", lambda: t.as_strided_(t.shape, [0] * t.dim())),
        ]
        name, way = self.one(ways)
        if not _whole(t) or t.numel() > 1 << 20 or t.is_shared():  # torch crashes where it resizes what is shared
            return
        try:
            way()
        except REFUSALS:
            return
        self.wrongs.append(f"{kind} after the handle was made: {name}, {t.dtype} {tuple(t.shape)}")

    def unpack(self) -> OpCall:
        w = self.weight()
        return self.done("plane_unpack", [list(w.tensors), list(w.geometry), self.one((0, 1))])

    def embedding(self) -> OpCall:
        w = self.weight()
        shape = self.leading()
        indices = torch.randint(0, max(w.rows, 1), shape, generator=self.g)
        indices = indices.to(self.one((torch.int64, torch.int32)))
        return self.done(
            "plane_embedding",
            [indices, list(w.tensors), list(w.geometry), self.pairs(indices.numel()) if self.chance(0.4) else None],
        )

    def backward(self) -> OpCall:
        w = self.weight()
        count = self.one((0, 1, 5))
        maps = self.pairs(count) if self.chance(0.5) else None
        return self.done(
            "plane_linear_backward", [self.floats(count, w.rows).float(), list(w.tensors), list(w.geometry), maps]
        )

    # --- generations -----------------------------------------------------------------------------------------------

    def pairs(self, count: int) -> Tensor:
        """The maps of rows, the same twice."""
        return torch.randint(0, 2, (count, 1), generator=self.g, dtype=torch.uint8).repeat(1, 2)

    def owners(self, count: int) -> Tensor:
        return torch.randint(-1, 2, (count,), generator=self.g)

    def published(self, tiles: Sequence[int] = (8, 0, 16), maps: int = 2) -> tuple[Tensor, list[Any]]:
        """A book of weights with so many tiles and two inputs, and the arguments that published its generation."""
        book = torch.ops.foveate.generation_book(torch.empty(0), tiles, 2)
        codes = torch.randint(0, len(LEVELS), (maps, sum(tiles)), generator=self.g)
        levels = torch.tensor(LEVELS, dtype=torch.uint8)[codes]
        inputs = torch.tensor([4, 8, 16, 32], dtype=torch.uint8)[torch.randint(0, 4, (maps, 2), generator=self.g)]
        pairs, choices = self.pairs(2), []
        if maps == 2 and self.chance(0.5):
            pairs, choices = torch.tensor([[1, 0], [0, 0]], dtype=torch.uint8), self.choices(tiles)
        args = [book, levels, inputs, torch.tensor([0.0, 0.0, -1.0, 1.0]), pairs, choices]
        if maps == 2:
            torch.ops.foveate.publish(*args)
        return book, args

    def choices(self, tiles: Sequence[int]) -> list[Tensor]:
        """What decides between maps 1 and 0: for each weight that has tiles one strip."""
        begins = torch.tensor([0, *(int(n > 0) for n in tiles)]).cumsum(0)
        samples = int(begins[-1])
        return [
            torch.tensor([[1, 0]], dtype=torch.uint8),
            torch.rand(1, len(tiles), generator=self.g),
            begins[None],
            torch.zeros(samples, dtype=torch.int64),
            torch.rand(samples, 16, generator=self.g),
            torch.zeros(1, len(tiles), 2, dtype=torch.int64),
        ]

    def estimate(self) -> OpCall:
        w = self.weight()
        x, strips = self.floats(*self.leading(), w.columns), max(1, w.grid[0])
        level = torch.tensor([8, self.one((4, 8, 16, 32))], dtype=torch.uint8)
        count = self.one((0, 1, 3)) if w.grid[0] else 0
        if self.chance(0.5):
            limits = self.one((None, torch.tensor([-1.0, 2.0])))
            sample = [torch.randint(0, strips, (count,), generator=self.g), torch.rand(count, 16, generator=self.g)]
            maps = [self.one((0, 1)), self.one((0, 1))]
            return self.done("plane_error", [x, list(w.tensors), list(w.geometry), level, limits, maps, *sample])
        book = self.reads([w.stored_levels.numel(), 8])
        rows = x.shape[:-1].numel()
        pairs = torch.tensor([[self.one((0, 1)), 0]] * rows, dtype=torch.uint8).view(rows, 2)
        return self.done("pass_choice", [book, [0, self.one((0, 1))], x, list(w.tensors), list(w.geometry), pairs])

    def reads(self, tiles: Sequence[int] = (8, 0, 16)) -> Tensor:
        """A book, mostly with a pass that is open; its rows have classes of their own, one time in two."""
        book, _ = self.published(tiles)
        if self.chance(0.5):
            torch.ops.foveate.rows_of_passes(book, torch.tensor([0, 1], dtype=torch.uint8))
        if self.chance(0.7):
            torch.ops.foveate.begin_pass(book, self.one((0, 1, 3)))
        return book

    def generation(self) -> OpCall:
        reads, x = self.reads(), self.floats(*self.leading(), 4)
        calls: dict[str, Callable[[], list[Any]]] = {
            "generation_book": lambda: [torch.empty(0), self.one(([], [0], [5, 1000])), self.one((0, 1, 5))],
            "publish": lambda: self.published((8, 0, 16), self.one((1, 3, 8)))[1],
            "rows_of_passes": lambda: [self.published()[0], self.pairs(3)[:, 0].contiguous()],
            "begin_pass": lambda: [self.published()[0], self.one((0, 1, 7))],
            "end_pass": lambda: [reads],
            "pass_levels": lambda: [reads, self.one((0, 0, 1)), self.one((2, 4)), self.one((2, 4))],
            "pass_input": lambda: [reads, self.one((0, 1))],
            "pass_rows": lambda: [reads, x, self.one((0, 1)), None],
            "pass_owners": lambda: [reads, self.one((0, 2, 6))],
            "pass_generation": lambda: [reads],
        }
        op = self.one(list(calls))
        return self.done(op, calls[op]())

    def rounding(self) -> OpCall:
        rows, columns, groups = self.one((0, 1, 5, 16, 70)), self.one((0, 1, 3, 64, 65, 100)), self.one((1, 2, 3))
        block = self.one((1, 4, 16, 64))
        own = self.chance(0.5)
        made = torch.randn(-(-rows // block), block, block, generator=self.g)
        common = [
            torch.randint(0, 16, (2, rows, columns), generator=self.g, dtype=torch.uint8),
            torch.randn(rows, columns, generator=self.g),
            torch.randn(columns, columns, generator=self.g) + 4 * torch.eye(columns),
            made if own else None,
            torch.rand(rows, groups, generator=self.g),
            torch.randn(rows, groups, generator=self.g),
            1 + 0.1 * torch.randn(2, rows, generator=self.g),
            torch.randint(0, groups, (columns,), generator=self.g),
            [0.2] * 5,
        ]
        if self.chance(0.5):
            return self.done("error_feedback", common)
        return self.done("coordinate_descent", [*common, self.one((0, 1, 2))], still=(9,))

    def group(self) -> OpCall:
        bits, size = self.one((2, 4, 8, 16)), self.one((32, 64, 96, 256, 1024))
        x = self.flat()
        which = self.random.randrange(3)
        if which == 0:
            return self.done("group_pack", [x, bits, size, self.one((None, 0, 5, 2**40, -1))])
        if which == 1:
            return self.done("group_variance", [x, [bits, 4, 8][: self.one((0, 1, 3))], size])
        codes, ranges = torch.ops.foveate.group_pack(x, bits, size)
        if self.chance(0.2):
            ranges = self.random_of(ranges)
        dtype = self.one((torch.float32, torch.bfloat16, torch.float16))
        return self.done("group_unpack", [codes, ranges, bits, size, x.numel(), dtype])

    def mask(self) -> OpCall:
        x = self.flat()
        which = self.random.randrange(3)
        if which == 0:
            x = x.to(self.one((torch.float32, torch.float64, torch.bool, torch.bfloat16)))
            return self.done("mask_pack", [x, self.one((0.0, -1.0, 1e300, float("nan")))])
        two = (x > 0).to(self.one((torch.float32, torch.float16, torch.uint8, torch.bool, torch.int64)))
        if which == 1:
            return self.done("two_values_pack", [two])
        bits = torch.ops.foveate.mask_pack(x, 0.0)
        return self.done("mask_unpack", [bits, two.new_zeros(2), x.numel()])

    def narrow(self) -> OpCall:
        bits, low = self.one((1, 2, 4, 8, 16, 32)), self.one((-3, 0, 5, 2**40))
        n = self.one((0, 1, 31, 32, 33, 100, 1000))
        dtype = self.one((torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool))
        if self.chance(0.5):
            x = torch.randint(0, 2, (n,), generator=self.g).to(dtype) + (low if dtype == torch.int64 else 0)
            return self.done("narrow_pack", [x, bits, low if dtype == torch.int64 else 0])
        codes = torch.randint(0, 256, (-(-n * bits // 8),), generator=self.g, dtype=torch.uint8)
        return self.done("narrow_unpack", [codes, bits, low, n, dtype])

    def moments(self) -> OpCall:
        return self.done("moments", [self.flat(), self.one((1, 2, 16, 1000))])

    def done(self, op: str, args: list[Any], *, wrong: bool = True, still: tuple[int, ...] = ()) -> OpCall:
        if wrong:
            right = {i: args[i] for i in still}
            args = self.wrong(args)
            for i, value in right.items():
                if i < len(args):
                    args[i] = value
        return OpCall(op, tuple(self.wrongs), lambda: getattr(torch.ops.foveate, op)(*args))


def op_call(seed: int, number: int) -> OpCall:
    """The call of this number."""
    make = _Maker(seed, number)
    kinds: tuple[Callable[[], OpCall], ...] = (
        lambda: make.plane_linear("plane_linear_no_grad"),
        lambda: make.plane_linear("plane_linear"),
        make.by_handle,
        make.by_handle,
        make.unpack,
        make.embedding,
        make.backward,
        make.generation,
        make.generation,
        make.estimate,
        make.rounding,
        make.group,
        make.mask,
        make.narrow,
        make.moments,
    )
    return make.one(kinds)()


def run(call: OpCall) -> bool:
    """Make a call; False if the op refused it. Any other error goes through."""
    try:
        call.run()
    except REFUSALS:
        return False
    return True
