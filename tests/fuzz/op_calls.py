"""Random calls of every op: right ones, and ones that are wrong in a few of their arguments.

A call is made of a seed and its number alone, so that any of them can be made again. Wrong means: of another dtype,
shape or layout, empty, as large as 2^63, sliced, expanded, with its storage made smaller, with other values, a tensor
missing or twice. Of handles also: tensors that were exchanged after the handle was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.formats.levels import PLANE_BITS
from fuzz.arguments import REFUSALS, whole
from fuzz.decoder_calls import DecoderArguments
from tiny import LEVELS


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


class _Maker(DecoderArguments):
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
        if self.chance(0.05) and handle.numel() == 1 and whole(handle):
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
        if not whole(t) or t.numel() > 1 << 20 or t.is_shared():  # torch crashes where it resizes what is shared
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
            "pass_levels": lambda: [reads, *self.one(((0, 2, 4), (0, 4, 2), (1, 0, 3), (2, 4, 4)))],
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
        op = self.one(("error_feedback", "coordinate_descent", "search_grids"))
        if op == "search_grids":
            weights = [common[1], torch.rand(columns, generator=self.g), self.one((32, 64, 128, 5))]
            return self.done(op, [*weights, self.one((0, -64, 32, 40)), 2.0, 8.0])
        if op == "error_feedback":
            return self.done(op, common)
        ended = [self.one((0, 1, 2)), self.one((0.0, 0.5, -1.0))]
        return self.done(op, [*common, *ended], still=(9, 10))

    def collecting(self) -> OpCall:
        x = torch.randn(self.one((0, 1, 64, 130)), self.one((1, 33, 100)), generator=self.g)
        squares = ("add_squared_gradients", [x.t() @ x, x[None], x[None]])
        return self.done(*self.one((("row_sums", [x]), ("input_changes", [x, x.flip(0)]), squares)))

    def converting(self) -> OpCall:
        rows, group = self.one((0, 16, 48)), self.one((32, 64, 128))
        columns, plane = group * self.one((0, 1, 3)), self.random.randrange(5)
        held = torch.randint(0, 256, (rows, columns // (4 if plane in (0, 3, 4) else 8)), generator=self.g)
        w = torch.randn(rows, columns, generator=self.g).to(self.one((torch.float16, torch.bfloat16)))
        parts = [torch.randn(rows, columns // group, generator=self.g) for _ in range(2)]
        held, planes = (
            held.to(torch.uint8),
            [torch.zeros(w.numel() * bits // 8, dtype=torch.uint8) for bits in PLANE_BITS],
        )
        calls = (
            ("plane_to_tiles", [held, plane, group, torch.zeros_like(held.flatten())]),
            ("half_extremes", [w, group]),
            ("halves_to_planes", [w, *parts, group, planes]),
            ("upper_halves", [held.flatten(), self.one((16, 8, 4)), torch.zeros_like(held.flatten()[::2])]),
        )
        return self.done(*self.one(calls))

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
        lambda: make.done("decoder_handle", make.handle_arguments()),
        lambda: make.done("decoder_blocks", make.blocks_arguments()),
        lambda: make.done("decoder_blocks_packed", make.packed_arguments()),
        lambda: make.done("decoder_blocks_paged", make.paged_arguments()),
        make.generation,
        make.generation,
        make.estimate,
        make.rounding,
        make.collecting,
        make.converting,
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
