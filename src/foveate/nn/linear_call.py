"""x times the weights of layers that share it, in one call of an op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.nn.plane_module import NO_BIAS, PlaneModule


class Products:
    """x times the weights of layers that share it, in one call and without gradients.

    Weights, input levels and ranges go by handle (see the op `plane_linear_by_handle`), for a compiled graph checks
    every tensor that it is given, at every call. Where a layer's planes, `input_level` or `input_range` become other
    tensors, or its weight another form, another handle is needed: `hold` makes it.
    """

    def __init__(self, layers: Sequence[PlaneModule]) -> None:
        self.hold(layers)
        # where biases are, for they may be exchanged; not the layers: what leads back to itself is freed late
        self._biases = (
            tuple(layer._parameters for layer in layers) if any(layer.bias is not None for layer in layers) else ()
        )

    def hold(self, layers: Sequence[PlaneModule]) -> None:
        """Take the planes, input levels and ranges that the layers have now."""
        weights = [layer.weight.value for layer in layers]
        tensors = [t for w in weights for t in w.tensors]
        forms = [n for w in weights for n in w.form]
        levels, ranges = [layer.input_level for layer in layers], [layer.input_range for layer in layers]
        self.handle: Tensor = torch.ops.foveate.plane_handle(tensors, forms, levels, ranges)
        self.rows = tuple(w.rows for w in weights)
        self.columns = weights[0].columns

    def of(self, x: Tensor) -> list[Tensor]:
        """x [..., K] -> [..., N] for each layer, in the dtype of x; raises `FoveateError` if x does not fit."""
        # the op checks too, and a graph has one thing less to check at every call
        if not torch.compiler.is_dynamo_compiling() and x.shape[-1] != self.columns:
            raise FoveateError(f"x has {x.shape[-1]} columns, the weight {self.columns}")
        biases = [NO_BIAS if bias is None else bias.float() for bias in (p.get("bias") for p in self._biases)]
        if x.dtype == torch.float64:
            return [y.double() for y in _multiplied(x.float(), self.handle, biases, self.rows)]
        return _multiplied(x, self.handle, biases, self.rows)


def _multiplied(x: Tensor, handle: Tensor, biases: list[Tensor], rows: tuple[int, ...]) -> list[Tensor]:
    outputs: list[Tensor] = torch.ops.foveate.plane_linear_by_handle(x, handle, biases, rows)
    return outputs
