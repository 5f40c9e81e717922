"""Fused groups: layers that multiply the same input (q, k and v; gate and up) in one call of an op.

The first layer of a group that is called computes the products of all its layers. So the input is quantized once, and
one call is made instead of several. The other layers' results are *pending* until those layers are called, or until
the call of the module that contains them ends.

A `CallScope` marks where a call of that containing module begins and ends, by hooks on it. A pending result belongs to
one call in one thread: it never outlives the call, and neither two threads nor nested calls share it. A layer that is
called while its containing module is not computes its own product.

A pending result is used only if all of this is as it was when the result was computed:

- the input is the very same tensor object;
- its version counter, which torch increments at every change in place, has not moved;
- it is of the same pass, and so of the same levels; outside of any pass, none were published since.

Some changes move no version counter, and are not noticed between two layers of one call: a change through `.data` or
`numpy()`. Tensors made in inference mode have no counter either. There, layers that have hooks, which might write to
the input, compute their own products.

While torch.compile traces, pending results are kept on the `CallScope`, within the trace, and the graph holds plain
calls. A trace does not notice changes in place between two layers of a group.

Groups are found by the names of layers in one containing module. The names also tell cross-attention apart, whose query
has another input than its keys. A name can mislead, and a model may not use all layers of a group. Then results stay
unused, and after a few of them the group is dissolved for good.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from foveate.nn.linear_call import LinearCall
from foveate.nn.passes import Passes
from foveate.nn.plane_module import PlaneModule

M = TypeVar("M", bound=PlaneModule)

#: Names of layers that share an input, where one module contains them all.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
#: Parts of the names of modules whose layers have different inputs: cross-attention.
SEPARATE_INPUTS = ("cross", "encoder_attn", "encdec", "encoder_attention")
#: A group is dissolved once this many more pending results stayed unused than were used.
_MOST_UNUSED = 8


class CallScope:
    """Where a call of a module that contains fused groups begins and ends: `begin` and `end` are hooks on that module.

    Attributes:
        is_open: whether a call has begun and not ended, as a trace sees it. All threads share this flag, so a trace may
            miss a fused call when another thread ends one; its results are right all the same.
        traced: within a trace, the pending results: their group, their input, and for each position its result.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.traced: tuple[FusedGroup, Tensor, dict[int, Tensor]] | None = None

    def begin(self, module: nn.Module, args: Any) -> None:
        """A forward pre-hook."""
        self.is_open = True
        if not torch.compiler.is_dynamo_compiling():
            _CALLS.open.append(_Call(self))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook that runs even if the call raised: drops the results that are still pending."""
        self.is_open = False
        self.traced = None
        if torch.compiler.is_dynamo_compiling():
            return
        calls = _CALLS.open
        for i in range(len(calls) - 1, -1, -1):
            if calls[i].scope is self:
                del calls[i:]
                return


class _Call:
    """One call of a containing module, and the results that are pending in it."""

    __slots__ = ("pending", "scope")

    def __init__(self, scope: CallScope) -> None:
        self.scope = scope
        self.pending: dict[FusedGroup, _Pending] = {}


class _Calls(threading.local):
    """The open calls of containing modules in this thread, the innermost last."""

    def __init__(self) -> None:
        self.open: list[_Call] = []


_CALLS = _Calls()


def drop_left_open(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of the whole model: drops calls that an interruption left open, since it runs no hooks."""
    if not torch.compiler.is_dynamo_compiling():
        _CALLS.open.clear()


class FusedGroup:
    """Layers that share their input.

    Attributes:
        is_fused: whether the layers are computed in one call. A group that was dissolved is never fused again.

    Args:
        layers: the layers.
        own_calls: the product of each alone.
        scope: of the module that contains them.
        now: gives the pass that is open, or what stands for the levels outside of any pass, as a value to compare.
    """

    def __init__(
        self, layers: Sequence[PlaneModule], own_calls: Sequence[LinearCall], scope: CallScope, now: Callable[[], Any]
    ) -> None:
        self.is_fused = True
        self._layers = tuple(weakref.ref(layer) for layer in layers)
        self._fused_call = LinearCall(layers)
        self._own_calls = tuple(own_calls)
        self._hooks = tuple(hooks for layer in layers for hooks in (layer._forward_pre_hooks, layer._forward_hooks))
        self._scope, self._now = scope, now
        self._unused = 0
        for layer in layers:
            layer.weight.users.add(self)

    def renew(self) -> None:
        """Take the planes that the layers' weights have now, after one of them was replaced."""
        layers = [layer for layer in (reference() for reference in self._layers) if layer is not None]
        if len(layers) == len(self._layers):
            self._fused_call.hold(layers)

    def product(self, position: int, x: Tensor) -> Tensor:
        """x [..., K] times the weight of the layer at `position` in the group, without gradients."""
        if torch.compiler.is_dynamo_compiling():
            return self._product_in_trace(position, x)
        calls = _CALLS.open
        if not calls or calls[-1].scope is not self._scope:
            return self._own_calls[position].of(x)[0]
        version = -1
        if not x.is_inference():
            version = x._version
        elif any(self._hooks):
            return self._own_calls[position].of(x)[0]
        state = (version, self._now(), torch.is_inference_mode_enabled())
        pending = calls[-1].pending.get(self)
        if pending is not None and pending.x is x and pending.state == state:
            y = pending.results.pop(position, None)
            if y is not None:
                self._unused -= 1
                return y
        if self._unused > _MOST_UNUSED:
            self.is_fused = False
            return self._own_calls[position].of(x)[0]
        results = dict(enumerate(self._fused_call.of(x)))
        y = results.pop(position)
        self._unused += len(results)
        calls[-1].pending[self] = _Pending(x, state, results)
        return y

    def _product_in_trace(self, position: int, x: Tensor) -> Tensor:
        """`product` while torch.compile traces, which cannot read version counters."""
        scope = self._scope
        if not scope.is_open:
            return self._own_calls[position].of(x)[0]
        traced = scope.traced
        if traced is not None and traced[0] is self and traced[1] is x:
            results = traced[2]
            y = results.pop(position, None)
            if not results:
                scope.traced = None
            return self._own_calls[position].of(x)[0] if y is None else y
        results = dict(enumerate(self._fused_call.of(x)))
        y = results.pop(position)
        scope.traced = (self, x, results)
        return y


class _Pending:
    """Results of one fused call that were not asked for yet, by position, and the input and state they are of."""

    __slots__ = ("results", "state", "x")

    def __init__(self, x: Tensor, state: tuple[int, Any, bool], results: dict[int, Tensor]) -> None:
        self.x = x
        self.state = state
        self.results = results


def fused_groups(names: Mapping[str, M]) -> Iterator[tuple[str, tuple[M, ...]]]:
    """The fused groups among layers by their full names: for each the name of the module around it, and its layers."""
    for name, layer in names.items():
        container, _, child = name.rpartition(".")
        for members in SHARED_INPUTS:
            if child != members[0] or any(part in container.lower() for part in SEPARATE_INPUTS):
                continue
            found = [names.get(f"{container}.{other}" if container else other) for other in members]
            layers = tuple(layer for layer in found if layer is not None)
            alike = {(layer.weight.value.columns, layer.weight.value.group) for layer in layers}
            if len(set(layers)) == len(members) and len(alike) == 1:
                yield container, layers


def hooked_scopes(model: nn.Module, names: Mapping[str, PlaneModule]) -> dict[str, CallScope]:
    """Put hooks on the module that contains each fused group. A ModuleDict or ModuleList is never called, so there the
    hooks are put on the next module around it.

    Returns:
        The scope of each containing module, by that module's name as `fused_groups` gives it.
    """
    made: dict[int, CallScope] = {}
    scopes: dict[str, CallScope] = {}
    for name in dict.fromkeys(name for name, _ in fused_groups(names)):
        module = model.get_submodule(name)
        around = name
        while isinstance(module, (nn.ModuleDict, nn.ModuleList)) and around:  # these are never called
            around = around.rpartition(".")[0]
            module = model.get_submodule(around)
        if id(module) not in made:
            made[id(module)] = scope = CallScope()
            module.register_forward_pre_hook(scope.begin)
            module.register_forward_hook(scope.end, always_call=True)
        scopes[name] = made[id(module)]
    if scopes:
        model.register_forward_pre_hook(drop_left_open, prepend=True)
    return scopes


def unhook(model: nn.Module) -> None:
    """Take every hook of `hooked_scopes` and `hooked_passes` off a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if hook is drop_left_open or isinstance(getattr(hook, "__self__", None), (CallScope, Passes)):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
