"""The ops on bit planes: `plane_linear`, `plane_unpack`, `plane_embedding`.

Schemas are defined here and nowhere else. The reference is registered for every device; compiled kernels, when they are
built, take the CPU over from it (`foveate.backends()` says which runs). Levels, residency and the choice of map are
tensors, so no switch recompiles a graph or allocates. docs/format.md has the arithmetic.

Gradients: inputs get dy @ W at the levels that were read (straight through their own quantization), biases get the sum
    of dy, planes get none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.formats.levels import PLANES
from foveate.kernels import reference

LIBRARY = torch.library.Library("foveate", "DEF")

_WEIGHT = "Tensor[] planes, Tensor scales, Tensor gain, Tensor starts, Tensor resident, Tensor tags"
_SHAPE = "int rows, int columns, int group, int reach, int which"
LIBRARY.define(f"plane_unpack({_WEIGHT}, {_SHAPE}) -> Tensor")
LIBRARY.define(f"plane_embedding(Tensor indices, {_WEIGHT}, {_SHAPE}) -> Tensor")
_WEIGHTS = "Tensor[] planes, Tensor[] scales, Tensor[] gains, Tensor[] starts, Tensor[] resident, Tensor[] tags"
LIBRARY.define(
    f"plane_linear(Tensor x, {_WEIGHTS}, Tensor[] biases, int[] rows, int group, int[] reach,"
    " Tensor input_level, Tensor? choice, Tensor? order) -> Tensor[]"
)
LIBRARY.impl("plane_unpack", reference.plane_unpack, "CompositeExplicitAutograd")
LIBRARY.impl("plane_embedding", reference.plane_embedding, "CompositeExplicitAutograd")
LIBRARY.impl("plane_linear", reference.plane_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("foveate::plane_unpack", lib=LIBRARY)
def _unpack_fake(
    planes: Sequence[Tensor],
    scales: Tensor,
    gain: Tensor,
    starts: Tensor,
    resident: Tensor,
    tags: Tensor,
    rows: int,
    columns: int,
    *_: int,
) -> Tensor:
    return scales.new_empty(rows, columns, dtype=torch.float32)


@torch.library.register_fake("foveate::plane_embedding", lib=LIBRARY)
def _embedding_fake(
    indices: Tensor,
    planes: Sequence[Tensor],
    scales: Tensor,
    gain: Tensor,
    starts: Tensor,
    resident: Tensor,
    tags: Tensor,
    rows: int,
    columns: int,
    *_: int,
) -> Tensor:
    return scales.new_empty(*indices.shape, columns, dtype=torch.float32)


@torch.library.register_fake("foveate::plane_linear", lib=LIBRARY)
def _linear_fake(
    x: Tensor,
    planes: Sequence[Tensor],
    scales: Sequence[Tensor],
    gains: Sequence[Tensor],
    starts: Sequence[Tensor],
    resident: Sequence[Tensor],
    tags: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[int],
    *_: Any,
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], n) for n in rows]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, planes, scales, gains, starts, resident, tags, biases, rows, group, reach, _, choice, order = inputs
    ctx.count = len(rows)
    # levels may be switched between forward and backward: backward must see the weight that forward used
    ctx.save_for_backward(choice, order, *planes, *scales, *gains, *starts, *resident, *(tag.clone() for tag in tags))
    ctx.static = (tuple(rows), group, tuple(reach), x.shape, x.dtype, tuple(b.numel() > 0 for b in biases))


def _linear_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    rows, group, reach, x_shape, x_dtype, has_bias = ctx.static
    count = ctx.count
    choice, order, *rest = ctx.saved_tensors
    planes, rest = rest[: PLANES * count], rest[PLANES * count :]
    scales, gains, starts, resident, tags = (rest[i * count : (i + 1) * count] for i in range(5))
    columns = x_shape[-1]
    grad_x = None
    grad_biases: list[Tensor | None] = []
    for w, grad in enumerate(grads):
        if grad is None:
            grad_biases.append(None)
            continue
        grad_MN = grad.reshape(-1, rows[w]).float()
        grad_biases.append(grad_MN.sum(0) if has_bias[w] else None)
        if not ctx.needs_input_grad[0]:
            continue

        def weight(which: int, w: int = w) -> Any:
            plane_args = (planes[w * PLANES : (w + 1) * PLANES], scales[w], gains[w], starts[w], resident[w], tags[w])
            return torch.ops.foveate.plane_unpack(*plane_args, rows[w], columns, group, reach[w], which)

        part = grad_MN @ weight(0)
        if choice is not None:
            part = torch.where(choice.reshape(-1, 1).bool(), grad_MN @ weight(1), part)
        grad_x = part if grad_x is None else grad_x + part
    if grad_x is not None:
        if order is not None:
            grad_x = torch.zeros_like(grad_x).index_add_(1, order, grad_x)
        grad_x = grad_x.reshape(x_shape).to(x_dtype)
    none = [None] * count
    return (grad_x, [None] * (PLANES * count), *[none] * 5, grad_biases, *[None] * 6)


torch.library.register_autograd("foveate::plane_linear", _linear_backward, setup_context=_linear_setup, lib=LIBRARY)
