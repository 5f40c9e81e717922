"""Run blocks of a model twice, so that backward needs the memory of one block at a time (activation checkpointing).

What backward keeps of a forward pass grows with every layer. A block that is replayed keeps its inputs only. Its first
run is without gradients. When backward reaches the block, it runs a second time, with gradients, and backward goes
through that run (Chen et al., "Training deep nets with sublinear memory cost", arXiv:1604.06174). Statistics are taken
in the second run, where the input of a row and the gradient of its output are there together. Who takes them asks
`Replay.first_run` and `Replay.second_run` which run it is.

The output of a block must depend on its inputs alone, and the block must not change them: a cache that grows with each
call would grow twice.
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

#: The most relative difference, in the mean magnitude of the outputs, between two runs that count as the same.
_SAME = 1e-3

#: Stands for a tensor in the structure that a block returns.
_TENSOR = object()


class Replay:
    """Runs blocks of a model twice: without gradients in forward, with gradients in backward.

    Attributes:
        blocks: names and modules, none inside another.
        first_run: whether a block is in its first run now, without gradients.
        second_run: whether a block is in its second run now, with gradients.
    """

    def __init__(self, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        self.blocks = tuple(blocks)
        self.first_run = False
        self.second_run = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Replay the calls of the blocks that are made with gradients while this is open."""
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
            made: list[Any] = []  # the structure of the outputs

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
        """Run the block without gradients. The argument `zero` asks for a gradient, so that the outputs do too."""
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
        """Run the block again with gradients, and go backward through it."""
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
