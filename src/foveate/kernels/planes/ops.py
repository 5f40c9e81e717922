"""The ops on bit planes: `plane_linear`, `plane_unpack`, `plane_embedding`.

Schemas are defined here and nowhere else. The compiled kernels run on the CPU, or the reference where none could be
built (`foveate.backends()` says which). Tensors on another device are refused. Levels, residency and the choice of map
are tensors, so no switch recompiles a graph or allocates. docs/format.md has the arithmetic, `reference.py` beside this
file the meaning of the arguments.

Gradients: inputs get dy @ W at the levels that were read (straight through their own quantization), biases get the sum
of dy, planes get none. `plane_linear_no_grad` is `plane_linear` for calls that need none: autograd's part of a custom
op is Python and takes longer than a small product. `plane_linear_by_handle` is that for modules: weights that
share an input, and the input level and range of each, are one small tensor, made by `plane_handle`. `input_range` [2]
(least, greatest) gives all rows of x one scale at levels 4 and 8; zeros, NaN, or none give each its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.library import LIBRARY, define
from foveate.kernels.planes import reference
from foveate.kernels.planes.reference import GEOMETRY_NUMBERS, WEIGHT_TENSORS

define("plane_unpack(Tensor[] weight, int[] form, int which) -> Tensor", reference.plane_unpack)
define("plane_embedding(Tensor indices, Tensor[] weight, int[] form, int which) -> Tensor", reference.plane_embedding)


@torch.library.register_fake("foveate::plane_unpack", lib=LIBRARY)
def _unpack_fake(weight: Sequence[Tensor], geometry: Sequence[int], which: int) -> Tensor:
    return weight[0].new_empty(geometry[0], geometry[1], dtype=torch.float32)


@torch.library.register_fake("foveate::plane_embedding", lib=LIBRARY)
def _embedding_fake(indices: Tensor, weight: Sequence[Tensor], geometry: Sequence[int], which: int) -> Tensor:
    return weight[0].new_empty(*indices.shape, geometry[1], dtype=torch.float32)


def _linear_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometries: Sequence[int], *_: Any
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], rows) for rows in geometries[::GEOMETRY_NUMBERS]]


for _name in ("plane_linear", "plane_linear_no_grad"):
    define(
        f"{_name}(Tensor x, Tensor[] weights, Tensor[] biases, int[] forms, Tensor input_level, Tensor? choice,"
        " Tensor? order, Tensor? input_range) -> Tensor[]",
        reference.plane_linear,
    )
    torch.library.register_fake(f"foveate::{_name}", _linear_fake, lib=LIBRARY)


# Inference by handle: a compiled graph checks every tensor that goes into it, at each call, and a weight has ten.
define(
    "plane_handle(Tensor[] weights, int[] forms, Tensor[] input_levels, Tensor[] input_ranges) -> Tensor",
    reference.plane_handle,
)
define(
    "plane_linear_by_handle(Tensor x, Tensor handle, Tensor[] biases, int[] rows) -> Tensor[]",
    reference.plane_linear_by_handle,
)


@torch.library.register_fake("foveate::plane_linear_by_handle", lib=LIBRARY)
def _by_handle_fake(x: Tensor, handle: Tensor, biases: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], n) for n in rows]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, geometries, _, choice, order, _ = inputs
    # levels may be switched between forward and backward: backward must see the weight that forward used
    active_levels = WEIGHT_TENSORS - 1
    kept = [t.clone() if i % WEIGHT_TENSORS == active_levels else t for i, t in enumerate(weights)]
    ctx.save_for_backward(choice, order, *kept)
    ctx.static = (tuple(geometries), x.shape, x.dtype, tuple(b.numel() > 0 for b in biases))


def _linear_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    geometries, x_shape, x_dtype, has_bias = ctx.static
    choice, order, *weights = ctx.saved_tensors
    grad_x = None
    grad_biases: list[Tensor | None] = []
    for w, grad in enumerate(grads):
        if grad is None:
            grad_biases.append(None)
            continue
        geometry = geometries[w * GEOMETRY_NUMBERS : (w + 1) * GEOMETRY_NUMBERS]
        grad_MN = grad.reshape(-1, geometry[0]).float()
        grad_biases.append(grad_MN.sum(0) if has_bias[w] else None)
        if not ctx.needs_input_grad[0]:
            continue
        tensors = weights[w * WEIGHT_TENSORS : (w + 1) * WEIGHT_TENSORS]
        part = grad_MN @ torch.ops.foveate.plane_unpack(tensors, geometry, 0)
        if choice is not None:
            second = grad_MN @ torch.ops.foveate.plane_unpack(tensors, geometry, 1)
            part = torch.where(choice.reshape(-1, 1).bool(), second, part)
        grad_x = part if grad_x is None else grad_x + part
    if grad_x is not None:
        if order is not None:
            grad_x = torch.zeros_like(grad_x).index_add_(1, order, grad_x)
        grad_x = grad_x.reshape(x_shape).to(x_dtype)
    return (grad_x, [None] * len(weights), grad_biases, *[None] * 5)


torch.library.register_autograd("foveate::plane_linear", _linear_backward, setup_context=_linear_setup, lib=LIBRARY)
