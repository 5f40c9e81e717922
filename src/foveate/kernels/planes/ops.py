"""The ops on bit planes: `plane_linear`, `plane_unpack`, `plane_embedding`.

Schemas are defined here and nowhere else. The compiled kernels run on the CPU, or the reference where none could be
built (`foveate.backends()` says which). Tensors on another device are refused. Levels, residency and the choice of map
are tensors, so no switch recompiles a graph or allocates. docs/format.md has the arithmetic, `reference.py` beside this
file the meaning of the arguments.

Gradients: inputs get dy @ W at the levels that were read (straight through their own quantization), biases get the sum
of dy, planes get none. `plane_linear_no_grad` is `plane_linear` for calls that need none: autograd's part of a custom
op is Python and takes longer than a small product. `plane_linear_by_handle` is that for modules: weights that
share an input are one small tensor, made by `plane_handle`, and the levels that it reads are those of a pass
(`foveate.kernels.planes.generations`). `input_range` [2] (least, greatest) gives all rows of x one scale at levels 4
and 8; zeros, NaN, or none give each its own. Each row of x reads one map of a table of at most 8; `maps` has a pair
(low, high) for each row, whose two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.library import LIBRARY, define
from foveate.kernels.planes import reference
from foveate.kernels.planes.reference import GEOMETRY_NUMBERS, WEIGHT_TENSORS

define("plane_unpack(Tensor[] weight, int[] geometry, int map) -> Tensor", reference.plane_unpack)
define(
    "plane_embedding(Tensor indices, Tensor[] weight, int[] geometry, Tensor? maps) -> Tensor",
    reference.plane_embedding,
)


@torch.library.register_fake("foveate::plane_unpack", lib=LIBRARY)
def _unpack_fake(weight: Sequence[Tensor], geometry: Sequence[int], map: int) -> Tensor:
    return weight[0].new_empty(geometry[0], geometry[1], dtype=torch.float32)


@torch.library.register_fake("foveate::plane_embedding", lib=LIBRARY)
def _embedding_fake(indices: Tensor, weight: Sequence[Tensor], geometry: Sequence[int], maps: Tensor | None) -> Tensor:
    return weight[0].new_empty(*indices.shape, geometry[1], dtype=torch.float32)


def _linear_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometries: Sequence[int], *_: Any
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], rows) for rows in geometries[::GEOMETRY_NUMBERS]]


for _name in ("plane_linear", "plane_linear_no_grad"):
    define(
        f"{_name}(Tensor x, Tensor[] weights, Tensor[] biases, int[] geometries, Tensor input_level, Tensor? maps,"
        " Tensor? order, Tensor? input_range) -> Tensor[]",
        reference.plane_linear,
    )
    torch.library.register_fake(f"foveate::{_name}", _linear_fake, lib=LIBRARY)


# A composite of `plane_unpack`: which maps the rows read is data, on which no graph can branch.
define(
    "plane_linear_backward(Tensor dy, Tensor[] weight, int[] geometry, Tensor? maps) -> Tensor",
    reference.plane_linear_backward,
)


@torch.library.register_fake("foveate::plane_linear_backward", lib=LIBRARY)
def _backward_fake(dy: Tensor, weight: Sequence[Tensor], geometry: Sequence[int], maps: Tensor | None) -> Tensor:
    return dy.new_empty(dy.shape[0], geometry[1])


# Inference by handle: a compiled graph checks every tensor that goes into it, at each call, and a weight has ten.
define(
    "plane_handle(Tensor[] weights, int[] geometries, Tensor[] input_levels, Tensor[] input_ranges, int[] places,"
    " int[] inputs) -> Tensor",
    reference.plane_handle,
)
define(
    "plane_linear_by_handle(Tensor x, Tensor handle, Tensor? book, Tensor? owners, Tensor[] biases, int[] rows)"
    " -> Tensor[]",
    reference.plane_linear_by_handle,
)


@torch.library.register_fake("foveate::plane_linear_by_handle", lib=LIBRARY)
def _by_handle_fake(
    x: Tensor,
    handle: Tensor,
    book: Tensor | None,
    owners: Tensor | None,
    biases: Sequence[Tensor],
    rows: Sequence[int],
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], n) for n in rows]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, geometries, _, maps, order, _ = inputs
    # a generation never changes, and autograd refuses tensors that were changed in place since
    ctx.save_for_backward(maps, order, *weights)
    ctx.static = (tuple(geometries), x.shape, x.dtype, tuple(b.numel() > 0 for b in biases))


def _linear_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    geometries, x_shape, x_dtype, has_bias = ctx.static
    maps, order, *weights = ctx.saved_tensors
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
        part = torch.ops.foveate.plane_linear_backward(grad_MN, tensors, geometry, maps)
        grad_x = part if grad_x is None else grad_x + part
    if grad_x is not None:
        if order is not None:
            grad_x = torch.zeros_like(grad_x).index_add_(1, order, grad_x)
        grad_x = grad_x.reshape(x_shape).to(x_dtype)
    return (grad_x, [None] * len(weights), grad_biases, *[None] * 5)


torch.library.register_autograd("foveate::plane_linear", _linear_backward, setup_context=_linear_setup, lib=LIBRARY)
