"""PlaneExperts: the experts of a mixture, each with weights of its own.

transformers keeps all experts of a layer in two parameters of three dimensions, `gate_up_proj` and `down_proj`. Here
these stacks are taken apart: each expert has its two projections as linear layers, whose weights are views of the stack
as long as they are float. So every expert is measured, rounded, allocated and stored by itself, under a name like
`model.layers.3.mlp.experts.5.down_proj`, and a token is multiplied only with the experts that it is routed to.

A stack can be taken apart if its layer follows the contract of transformers' `use_experts_implementation`: [E, out, in]
or [E, in, out], with or without biases, a gate (the layer's own `_apply_gate`), and a norm after each expert. Llama 4
does not follow it, for it gives every expert its rows instead of indices; it is supported as well.

Shapes: T tokens, k experts for each token, S = T * k rows, E experts, H model width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from foveate.nn.modules import take_hooks, without
from foveate.nn.plane_module import PlaneModule
from foveate.nn.replace import replace_module

#: The flags that `use_experts_implementation` sets on a layer, and those of later releases. Before those,
#: every expert had a gate (transformers 5.2), and none a norm (5.17).
_FLAGS = ("has_bias", "is_transposed")
_LATER_FLAGS = {"has_gate": True, "has_post_expert_norm": False}
_UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"
#: Every parameter of a layer that is taken apart.
STACKS = tuple(name for base in (*_UP, DOWN) for name in (base, f"{base}_bias"))

# Which experts a token is routed to is data, on which no graph can branch. So in a graph a layer of experts is one op,
# which finds the layer by its number. No number is used twice.
_LAYERS: WeakValueDictionary[int, PlaneExperts] = WeakValueDictionary()
_NUMBERS = itertools.count()
_FRAGMENT = torch.library.Library("foveate", "FRAGMENT")
_FRAGMENT.define("plane_experts(Tensor x, Tensor index, Tensor weights, int layer) -> Tensor")


def _plane_experts(x: Tensor, index: Tensor, weights: Tensor, layer: int) -> Tensor:
    return _LAYERS[layer].routed(x, index, weights)


_FRAGMENT.impl("plane_experts", _plane_experts, "CompositeExplicitAutograd")


def _plane_experts_fake(x: Tensor, index: Tensor, weights: Tensor, layer: int) -> Tensor:
    return x.new_empty(x.shape)


torch.library.register_fake("foveate::plane_experts", _plane_experts_fake, lib=_FRAGMENT)


class PlaneExperts(nn.Module):
    """The experts of one layer: `experts.0.gate_up_proj`, `experts.0.down_proj`, `experts.1.gate_up_proj` and so on.

    Called as the layer it replaces is.

    Attributes:
        origin: the replaced layer without its weights: the gate, the activation, a norm.
        up: the name of the first projection, `gate_up_proj` or `up_proj`.
        routes: how many experts a token was routed to in the last call, on average; None before the first call.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up = _UP[0] if layer._parameters.get(_UP[0]) is not None else _UP[1]
        transposed = is_transposed(layer)
        self.routes: float | None = None
        self.num_experts = cast(Tensor, getattr(layer, DOWN)).shape[0]
        self.origin = without(layer, *STACKS)
        for i in range(self.num_experts):
            parts = {name: _linear_of(layer, name, i, transposed) for name in (self.up, DOWN)}
            self.add_module(str(i), nn.ModuleDict(cast("dict[str, nn.Module]", parts)))
        take_hooks(self, layer)
        self.train(layer.training)
        self._register_number()

    def _register_number(self) -> None:
        self._number = next(_NUMBERS)
        _LAYERS[self._number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register_number()  # a copy has a number of its own

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Compute each token's experts, and add up their outputs by weight.

        Args:
            hidden_states: [T, H]; without indices [E * T, H], the rows of the first expert first.
            top_k_index: integers [T, k]; a number beyond the last expert stands for no expert.
            top_k_weights: [T, k].

        Returns:
            [T, H] (without indices [E * T, H]), in the dtype of `hidden_states`.
        """
        if top_k_index is None:
            return self._sorted(hidden_states)
        assert top_k_weights is not None
        if torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled():
            out: Tensor = torch.ops.foveate.plane_experts(hidden_states, top_k_index, top_k_weights, self._number)
            return out
        return self.routed(hidden_states, top_k_index, top_k_weights)

    def routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`forward` where indices are given."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids_S = top_k_index.reshape(-1)
        each = top_k_index.shape[-1]
        self.routes = float(each)
        counts = torch.bincount(ids_S.clamp(max=self.num_experts), minlength=self.num_experts + 1)
        counts_E = counts[: self.num_experts].tolist()
        order_S = ids_S.argsort(stable=True)[: sum(counts_E)]
        owners_T = self._owners(len(x_TH))
        owners_S = None if owners_T is None else owners_T[order_S // each]
        y_SH = self._outputs(x_TH[order_S // each], counts_E, owners_S)
        y_SH = y_SH * top_k_weights.reshape(-1)[order_S, None]
        spread_SH = y_SH.new_zeros(len(ids_S), y_SH.shape[-1]).index_copy(0, order_S, y_SH)
        # the sum of each token is in the order of its experts' ranks, so it does not depend on the other tokens
        out_TH = spread_SH.view(len(x_TH), each, y_SH.shape[-1]).sum(1)
        return out_TH.to(hidden_states.dtype).reshape(hidden_states.shape)

    def _sorted(self, x: Tensor) -> Tensor:
        """Llama 4: rows come in E equal parts, one for each expert; rows that are not routed to it are zeros."""
        own = x.reshape(self.num_experts, -1, x.shape[-1])
        routed_ET = own.detach().ne(0).any(-1)
        counts_E = routed_ET.sum(1).tolist()
        self.routes = sum(counts_E) / max(own.shape[1], 1)
        owners_T = self._owners(own.shape[1])
        owners_S = None if owners_T is None else owners_T.expand(self.num_experts, -1)[routed_ET]
        y = self._outputs(own[routed_ET], counts_E, owners_S)
        return y.new_zeros(x.shape).index_copy(0, routed_ET.reshape(-1).nonzero()[:, 0], y)

    def _owners(self, tokens: int) -> Tensor | None:
        """The row of the pass that each token belongs to; None where nothing was asked for rows."""
        weight = next((m.weight for m in self.modules() if isinstance(m, PlaneModule)), None)
        return None if weight is None or weight.passes is None else weight.passes.owners(tokens)

    def _outputs(self, x_SH: Tensor, counts_E: list[int], owners_S: Tensor | None) -> Tensor:
        """Rows of x, those of the first expert first -> the output of each row's expert, [S, H]."""
        owners = [None] * len(counts_E) if owners_S is None else owners_S.split(counts_E)
        parts = [self._output(i, x, owners[i]) for i, x in enumerate(x_SH.split(counts_E)) if len(x)]
        return torch.cat(parts) if parts else x_SH

    def _output(self, number: int, x: Tensor, owners: Tensor | None) -> Tensor:
        def projected(name: str, x: Tensor) -> Tensor:
            layer = expert[name]
            return cast(Tensor, layer(x, owners) if owners is not None and isinstance(layer, PlaneModule) else layer(x))

        expert = cast(nn.ModuleDict, self._modules[str(number)])
        origin: Any = self.origin
        y = projected(self.up, x)
        if self.up != _UP[0]:
            y = origin.act_fn(y)
        elif hasattr(origin, "_apply_gate"):
            y = origin._apply_gate(y)
        else:
            gate, up = y.chunk(2, dim=-1)
            y = up * origin.act_fn(gate)
        y = projected(DOWN, y)
        return cast(Tensor, origin.post_expert_norm(y)) if getattr(origin, "has_post_expert_norm", False) else y

    def extra_repr(self) -> str:
        """How many experts there are."""
        return f"{self.num_experts} experts"


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's stacks are [E, in, out]."""
    return bool(getattr(layer, "is_transposed", _is_llama4(layer)))


def _linear_of(layer: nn.Module, name: str, number: int, transposed: bool) -> nn.Linear:
    """One expert's projection, its weight a view of the stack."""
    stack: nn.Parameter = getattr(layer, name)
    bias: nn.Parameter | None = getattr(layer, f"{name}_bias", None)
    weight_NK = stack.data[number].t() if transposed else stack.data[number]
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.out_features, made.in_features = weight_NK.shape
    made.weight = nn.Parameter(weight_NK, requires_grad=stack.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.data[number], requires_grad=bias.requires_grad)
    return made


def _is_llama4(layer: nn.Module) -> bool:
    kind = type(layer)
    return kind.__name__ == "Llama4TextExperts" and kind.__module__.startswith("transformers.")


def _can_take_apart(layer: nn.Module) -> bool:
    """Whether a layer's stacks of weights can be taken apart."""
    up = layer._parameters.get(_UP[0])
    up = up if up is not None else layer._parameters.get(_UP[1])
    down = layer._parameters.get(DOWN)
    if up is None or down is None or up.dim() != 3 or down.dim() != 3 or len(up) != len(down):
        return False
    if not up.is_floating_point() or not down.is_floating_point():
        return False
    if _is_llama4(layer):
        return True
    flags = [getattr(layer, flag, None) for flag in _FLAGS]
    flags += [getattr(layer, flag, before) for flag, before in _LATER_FLAGS.items()]
    has_flags = all(isinstance(flag, bool) for flag in flags)
    # the contract wraps the forward of a layer; a subclass with a forward of its own computes something else
    wrapped = hasattr(type(layer).forward, "__wrapped__")
    gated = getattr(layer, "has_gate", _LATER_FLAGS["has_gate"]) is (layer._parameters.get(_UP[0]) is not None)
    return has_flags and wrapped and gated and not getattr(layer, "_is_expert_parallel", False)


def left_notes(model: nn.Module) -> list[str]:
    """A sentence for each layer that looks like a stack of experts but has a layout that is not known here."""
    return [
        f"{name} ({type(module).__name__}) was left as it is: a layout of experts that is not known here"
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower()
        and not isinstance(module, PlaneExperts)
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    ]


def merged(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of modules, in which the name of a layer stands for those of its experts where all of them are named."""
    listed = set(names)
    for layer, module in model.named_modules():
        if isinstance(module, PlaneExperts):
            own = {f"{layer}.{i}.{part}" for i in range(module.num_experts) for part in (module.up, DOWN)}
            if own <= listed:
                listed = listed - own | {layer}
    return [name for name in names if name in listed] + sorted(listed - set(names))


@contextmanager
def taken_apart(model: nn.Module, only: frozenset[str] | None = None) -> Iterator[None]:
    """Take the stacks of experts of a model apart; on leaving, restore the layers that hold no planes.

    Args:
        model: any module.
        only: names of the layers to take apart; if not given, all that can be taken apart.
    """
    named = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n and _can_take_apart(m)]
    wanted = {id(module) for name, module in named if only is None or name in only}  # a stack may have several names
    held = [(name, module) for name, module in named if id(module) in wanted]
    made = {id(module): PlaneExperts(module) for _, module in held}
    for name, module in held:
        replace_module(model, name, made[id(module)])
    try:
        yield
    finally:
        for name, module in held:
            experts = made[id(module)]
            if not any(isinstance(m, PlaneModule) for m in experts.modules()):
                replace_module(model, name, module)
                continue
            for layer in experts.modules():
                if isinstance(layer, nn.Linear):  # it was left float: its view must not keep the whole stack in memory
                    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=layer.weight.requires_grad)
