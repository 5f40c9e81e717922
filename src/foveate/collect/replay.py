"""Run parts of a model twice, so that backward needs the memory of one part at a time.

What backward keeps of a forward pass grows with every layer. A block that is replayed keeps its inputs only: it runs
without gradients at first, and when its turn comes in backward it runs again, with gradients, and backward goes through
it (Chen et al., "Training deep nets with sublinear memory cost", arXiv:1604.06174). Statistics are taken in the second
run, in which a row's input and the gradient of its output are there together; whoever takes them asks `ahead` and
`again` which run it is.

What a block computes must depend on its inputs alone, and it must not change them: a cache that grows with each call
would grow twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from foveate.errors import DataError

#: Relative change of a block's output, in the mean of its magnitude, up to which its second run is taken for the first.
_SAME = 1e-3

#: Stands for a tensor among what a block returns.
_TENSOR = object()


class Replay:
    """Runs blocks of a model so.

    Attributes:
        blocks: modules, none inside another, and their names.
        ahead: whether a block runs for the first time now, without gradients.
        again: whether one runs for the second time.
    """

    def __init__(self, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        self.blocks = tuple(blocks)
        self.first_run = False
        self.second_run = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """While this is open, calls of the blocks that keep gradients are replayed."""
        before = [(block, block.__dict__.get("forward")) for _, block in self.blocks]
        for name, block in self.blocks:
            block.forward = self._replaying(name, block.forward)
        try:
            yield
        finally:
            self.first_run = self.second_run = False
            for block, own in before:
                if own is None:
                    del block.__dict__["forward"]
                else:
                    block.forward = own

    def _replaying(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.first_run or self.second_run or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            leaves, shape = tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            made: list[Any] = []  # how the outputs are put together

            def inner(*tensors: Tensor) -> list[Tensor]:
                given = list(leaves)
                for place, tensor in zip(places, tensors, strict=True):
                    given[place] = tensor
                own_args, own_kwargs = tree_unflatten(given, shape)
                parts, form = tree_flatten(forward(*own_args, **own_kwargs))
                if self.first_run:
                    made[:] = [[_TENSOR if isinstance(part, Tensor) else part for part in parts], form]
                return [part for part in parts if isinstance(part, Tensor)]

            zero = torch.zeros((), requires_grad=True)
            outputs = iter(_Replayed.apply(self, name, inner, zero, *(leaves[i] for i in places)))  # type: ignore[no-untyped-call]
            parts, form = made
            return tree_unflatten([next(outputs) if part is _TENSOR else part for part in parts], form)

        return call


class _Replayed(torch.autograd.Function):
    """One call of a block."""

    @staticmethod
    def forward(
        ctx: Any, replay: Replay, name: str, inner: Callable[..., list[Tensor]], zero: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Without gradients; `zero` is there so that the outputs ask for one."""
        versions = [t._version for t in inputs]
        replay.first_run = True
        try:
            outputs = inner(*inputs)
        finally:
            replay.first_run = False
        if versions != [t._version for t in inputs]:
            raise DataError(f"{name} changes its inputs in place and cannot be run twice: give more memory")
        ctx.replay, ctx.name, ctx.inner = replay, name, inner
        ctx.size = sum(float(t.abs().mean()) for t in outputs if t.is_floating_point())
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return tuple(t.view_as(t) if any(t is x for x in inputs) else t for t in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Run the block again, with gradients, and go through it."""
        replay: Replay = ctx.replay
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        replay.second_run = True
        try:
            with torch.enable_grad():
                outputs = ctx.inner(*inputs)
                size = sum(float(t.detach().abs().mean()) for t in outputs if t.is_floating_point())
                if math.isfinite(ctx.size) and not abs(size - ctx.size) <= _SAME * abs(ctx.size):
                    raise DataError(
                        f"{ctx.name} does not compute the same when it is run twice (a cache, or chance): "
                        "give more memory, so that it need not be"
                    )
                wanted = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
                torch.autograd.backward([y for y, _ in wanted], [g for _, g in wanted])
        finally:
            replay.second_run = False
        return None, None, None, None, *(x.grad for x in inputs)
