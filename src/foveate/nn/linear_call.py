"""LinearCall: x times the weights of one or more layers that share this input, in one call of an op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.nn.plane_module import NO_BIAS, PlaneModule


class LinearCall:
    """x times the weights of layers that share this input, in one call and without gradients.

    Weights, input levels and ranges are passed by handle (see the op `plane_linear_by_handle`), because a compiled
    graph checks every tensor argument at every call. A new handle is needed, and `hold` makes it, when a layer's
    planes, `input_level` or `input_range` are replaced by other tensors, or its weight gets another geometry or place.
    """

    def __init__(self, layers: Sequence[PlaneModule]) -> None:
        self.hold(layers)
        # dictionaries that hold the biases, for a bias may be replaced; not the layers, for a cycle of references would
        # keep the planes in memory too long
        self._biases = (
            tuple(layer._parameters for layer in layers) if any(layer.bias is not None for layer in layers) else ()
        )

    def hold(self, layers: Sequence[PlaneModule]) -> None:
        """Take the planes, input levels and ranges that the layers have now."""
        weights = [layer.weight.value for layer in layers]
        self._passes = layers[0].weight.passes
        places, inputs = ([layer.weight.place for layer in layers], [layer.input_place for layer in layers])
        tensors = [t for w in weights for t in w.tensors]
        geometries = [n for w in weights for n in w.geometry]
        levels, ranges = [layer.input_level for layer in layers], [layer.input_range for layer in layers]
        self.handle: Tensor = torch.ops.foveate.plane_handle(tensors, geometries, levels, ranges, places, inputs)
        self.rows = tuple(w.rows for w in weights)
        self.columns = weights[0].columns

    def of(self, x: Tensor, owners: Tensor | None = None) -> list[Tensor]:
        """x [..., K] -> [..., N] for each layer, in the dtype of x; raises `FoveateError` if x does not fit.

        `owners` says for each row of x which row of the pass it belongs to, where its shape does not.
        """
        # not in a graph, where it would be one more check at every call; the op checks too
        if not torch.compiler.is_dynamo_compiling() and x.shape[-1] != self.columns:
            raise FoveateError(f"x has {x.shape[-1]} columns, the weight {self.columns}")
        biases = [NO_BIAS if bias is None else bias.float() for bias in (p.get("bias") for p in self._biases)]
        book = None if self._passes is None else self._passes.book
        given = x.float() if x.dtype == torch.float64 else x
        outputs: list[Tensor] = torch.ops.foveate.plane_linear_by_handle(
            given, self.handle, book, owners, biases, self.rows
        )
        return outputs if given is x else [y.double() for y in outputs]
