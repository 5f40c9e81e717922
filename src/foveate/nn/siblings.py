"""Layers that multiply the same input (q, k and v; gate and up) in one call.

The first of them that is called computes all, which quantizes the input once and costs one call. Its siblings' results
wait on the input itself, as an attribute of that very tensor, until they are asked for: so nothing outlives the input,
no other tensor can be mistaken for it, two threads do not meet, and a compiled graph sees plain calls. A result is only
taken while the input and the levels are what they were.

Siblings are found by name, at one parent; cross-attention, whose query has another input than its keys, is told from
the names too, or else from the first forward pass: where another layer than usual has to begin, they part for good.
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


class Siblings:
    """Layers that share their input.

    Attributes:
        layers: in order.
        together: whether they do; once seen not to, they never do again.
        first: which of them begins.
    """

    def __init__(self, layers: tuple[PlaneLinear, ...]) -> None:
        self.layers = layers
        self.together = True
        self.first: int | None = None

    def product(self, place: int, x: Tensor) -> Tensor:
        """x [..., K] times the weight of the layer at `place`, without gradients."""
        state = self._state(x)
        waiting: _Waiting | None = getattr(x, _WAITING, None)
        if waiting is not None and waiting.of is self and waiting.state == state:
            y = waiting.results[place]
            if y is not None:
                waiting.results[place] = None
                return y
        if not torch.compiler.is_compiling():
            self.together = self.first is None or self.first == place
            self.first = place
            if not self.together:
                return products(x, self.layers[place : place + 1])[0]
        results: list[Tensor | None] = [*products(x, self.layers)]
        y, results[place] = results[place], None
        setattr(x, _WAITING, _Waiting(self, state, results))
        assert y is not None
        return y

    def _state(self, x: Tensor) -> tuple[int, ...]:
        """What changes when x or a level is written to: the levels of a model are one block each.

        Inference tensors do not tell, and in a graph that is being compiled nothing is written between siblings that
        the graph would not show.
        """
        if torch.compiler.is_compiling():
            return ()
        layer = self.layers[0]
        watched = (x, layer.weight.value.tags, layer.input_level)
        return tuple(-1 if t.is_inference() else t._version for t in watched)


class _Waiting:
    def __init__(self, of: Siblings, state: tuple[int, ...], results: list[Tensor | None]) -> None:
        self.of = of
        self.state = state
        self.results = results


def products(x: Tensor, layers: Sequence[PlaneLinear]) -> list[Tensor]:
    """x [..., K] times the weight of each layer, in one call, without gradients.

    Raises:
        FoveateError: x does not have K columns.
    """
    if x.shape[-1] != layers[0].in_features:
        raise FoveateError(f"x has {x.shape[-1]} columns, the weight {layers[0].in_features}")
    y: list[Tensor] = torch.ops.foveate.plane_linear_by_handle(
        x if x.dtype != torch.float64 else x.float(),
        [layer.weight.handle for layer in layers],
        [NO_BIAS if layer.bias is None else layer.bias.float() for layer in layers],
        [layer.out_features for layer in layers],
        [layer.input_level for layer in layers],
    )
    return y if x.dtype != torch.float64 else [one.double() for one in y]


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
