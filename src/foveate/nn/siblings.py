"""Layers that multiply the same input (q, k and v; gate and up) in one call.

The first of them that is called computes all, which quantizes the input once and costs one call. Its siblings' results
wait on the input itself, as an attribute of that very tensor, until they are asked for: so nothing outlives the input,
no other tensor can be mistaken for it, and two threads do not meet. A result is only taken while the input and the
levels are what they were. While a graph is traced, results wait on the siblings instead, within the trace: the graph
sees plain calls. Tensors of inference mode keep no count of their changes: there, outside graphs, each layer computes
its own.

Siblings are found by name, at one parent; cross-attention, whose query has another input than its keys, is told from
the names too. Where results are left lying, because a name misled or because some layers are not used, they part for
good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.nn.modules import PlaneLinear

#: Children of one parent that share its input.
FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
#: Parts of the names of parents whose children have different inputs.
APART = ("cross", "encoder_attn", "encdec", "encoder_attention")
NO_BIAS = torch.empty(0)
_WAITING = "_foveate_waiting"
#: So many more results made for siblings and left lying than taken, and they part.
_WASTE = 8


class Products:
    """x times the weights of layers that share it, in one call and without gradients.

    Weights, input levels and ranges go by handle (see the op `plane_linear_by_handle`), for a compiled graph checks
    every tensor that it is given, at every call. Where a layer's planes, `input_level` or `input_range` become other
    tensors, another one is needed; `Registry` sees to that.
    """

    def __init__(self, layers: Sequence[PlaneLinear]) -> None:
        weights = [layer.weight.value for layer in layers]
        tensors = [t for w in weights for t in w.tensors]
        forms = [n for w in weights for n in w.form]
        levels, ranges = [layer.input_level for layer in layers], [layer.input_range for layer in layers]
        self.handle: Tensor = torch.ops.foveate.plane_handle(tensors, forms, levels, ranges)
        self.rows = tuple(w.rows for w in weights)
        self.columns = weights[0].columns
        # where biases are, for they may be exchanged; not the layers: what leads back to itself is freed late
        self._biases = (
            tuple(layer._parameters for layer in layers) if any(layer.bias is not None for layer in layers) else ()
        )

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


class Household:
    """What all siblings of a model have in common.

    Attributes:
        switches: how often levels were switched.
        traced: within a trace, the results that wait: for whom, of which input, and for each place that is left. Where
            a graph ends amid siblings they stay, until levels are switched.
    """

    def __init__(self) -> None:
        self.switches = 0
        self.traced: tuple[Siblings, Tensor, dict[int, Tensor]] | None = None

    def switched(self) -> None:
        """Levels were switched: what waits is no longer true."""
        self.switches += 1
        self.traced = None


class Siblings:
    """Layers that share their input.

    Attributes:
        together: whether they do; once they part, they never do again.
    """

    def __init__(self, layers: Sequence[PlaneLinear], household: Household) -> None:
        self.together = True
        self._all = Products(layers)
        self._alone = tuple(layer.alone for layer in layers)
        self._household = household
        self._wasted = 0

    def product(self, place: int, x: Tensor) -> Tensor:
        """x [..., K] times the weight of the layer at `place`, without gradients."""
        if torch.compiler.is_dynamo_compiling():
            return self._product_in_trace(place, x)
        if x.is_inference():
            return self._alone[place].of(x)[0]  # such a tensor does not tell that it was changed
        state = (self, x._version, self._household.switches, torch.is_inference_mode_enabled())
        waiting: _Waiting | None = getattr(x, _WAITING, None)
        if waiting is not None and waiting.state == state:
            y = waiting.results.pop(place, None)
            if y is not None:
                self._wasted -= 1
                if not waiting.results:
                    x.__dict__.pop(_WAITING, None)  # x may be the user's, to be saved or copied
                return y
        if self._wasted > _WASTE:
            self.together = False
        if not self.together:
            return self._alone[place].of(x)[0]
        results = dict(enumerate(self._all.of(x)))
        y = results.pop(place)
        self._wasted += len(results)
        setattr(x, _WAITING, _Waiting(state, results))
        return y

    def _product_in_trace(self, place: int, x: Tensor) -> Tensor:
        """The same while torch.compile traces, which can neither read versions nor delete a tensor's attribute.

        What a graph changes in place between siblings is not seen.
        """
        traced = self._household.traced
        if traced is not None and traced[0] is self and traced[1] is x:
            results = traced[2]
            y = results.pop(place, None)
            if not results:
                self._household.traced = None
            return self._alone[place].of(x)[0] if y is None else y
        results = dict(enumerate(self._all.of(x)))
        y = results.pop(place)
        self._household.traced = (self, x, results)
        return y


class _Waiting:
    def __init__(self, state: tuple[Siblings, int, int, bool], results: dict[int, Tensor]) -> None:
        self.state = state
        self.results = results


def families(names: Mapping[str, PlaneLinear]) -> Iterator[tuple[PlaneLinear, ...]]:
    """Layers that share an input, by their full names."""
    for name, layer in names.items():
        parent, _, child = name.rpartition(".")
        for family in FAMILIES:
            if child != family[0] or any(part in parent.lower() for part in APART):
                continue
            found = [names.get(f"{parent}.{other}" if parent else other) for other in family]
            layers = tuple(layer for layer in found if layer is not None)
            alike = {(layer.weight.value.columns, layer.weight.value.group) for layer in layers}
            if len(set(layers)) == len(family) and len(alike) == 1:
                yield layers
