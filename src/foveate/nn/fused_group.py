"""Layers that multiply the same input (q, k and v; gate and up) in one call.

The first of them that is called computes all, which quantizes the input once and costs one call. Its siblings' results
wait until they are asked for, or until the call of their parent ends: hooks on the parent say when one begins and ends.
So nothing outlives that call, and two threads, or a call within a call, do not meet. A layer that is called while its
parent is not computes its own.

A result is only taken for the very tensor that it was made of, while its count of changes and the levels are what they
were. What has no such count is not seen between two siblings of one call: a change through `.data` or `numpy()`, and
any change of a tensor of inference mode (where siblings that have hooks, which might write, each compute their own).

While a graph is traced, results wait on the parent's record, within the trace: the graph sees plain calls. Changes in
place between siblings are not seen there.

Siblings are found by name, at one parent; cross-attention, whose query has another input than its keys, is told from
the names too. Where results are left lying, because a name misled or because some layers are not used, they part for
good.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from foveate.nn.linear_call import Products
from foveate.nn.plane_module import PlaneModule

M = TypeVar("M", bound=PlaneModule)

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
#: So many more results made for siblings and left lying than taken, and they part.
_WASTE = 8


class Parent:
    """What a module whose children share an input and these children know of its calls: begun and ended by hooks on it.

    Attributes:
        under_way: whether a call is, as a trace sees it. Threads share it, which can cost a trace its joint product.
        traced: within a trace, the results that wait: for whom, of which input, and for each place that is left.
    """

    def __init__(self) -> None:
        self.under_way = False
        self.traced: tuple[Siblings, Tensor, dict[int, Tensor]] | None = None

    def begin(self, module: nn.Module, args: Any) -> None:
        """A forward pre-hook."""
        self.under_way = True
        if not torch.compiler.is_dynamo_compiling():
            _CALLS.open.append(_Call(self))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook that is always called: what still waits is dropped, whatever the call ended with."""
        self.under_way = False
        self.traced = None
        if torch.compiler.is_dynamo_compiling():
            return
        calls = _CALLS.open
        for i in range(len(calls) - 1, -1, -1):
            if calls[i].parent is self:
                del calls[i:]
                return


class _Call:
    """One call of a parent, and the results that wait in it."""

    __slots__ = ("parent", "waiting")

    def __init__(self, parent: Parent) -> None:
        self.parent = parent
        self.waiting: dict[Siblings, _Waiting] = {}


class _Calls(threading.local):
    """The calls of parents that are under way in this thread, the innermost last."""

    def __init__(self) -> None:
        self.open: list[_Call] = []


_CALLS = _Calls()


def begin_pass(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of the whole model: what an interruption left open (it calls no hooks) is dropped."""
    if not torch.compiler.is_dynamo_compiling():
        _CALLS.open.clear()


class Switches:
    """How often the levels of a model were switched."""

    def __init__(self) -> None:
        self.count = 0


class Siblings:
    """Layers that share their input.

    Attributes:
        together: whether they do; once they part, they never do again.
    """

    def __init__(
        self, layers: Sequence[PlaneModule], alone: Sequence[Products], parent: Parent, switches: Switches
    ) -> None:
        self.together = True
        self._layers = tuple(weakref.ref(layer) for layer in layers)
        self._all = Products(layers)
        self._alone = tuple(alone)
        self._hooks = tuple(hooks for layer in layers for hooks in (layer._forward_pre_hooks, layer._forward_hooks))
        self._parent, self._switches = parent, switches
        self._wasted = 0
        for layer in layers:
            layer.weight.users.add(self)

    def renew(self) -> None:
        """A weight has become another: hold it as it is now."""
        layers = [layer for layer in (reference() for reference in self._layers) if layer is not None]
        if len(layers) == len(self._layers):
            self._all.hold(layers)

    def product(self, place: int, x: Tensor) -> Tensor:
        """x [..., K] times the weight of the layer at `place`, without gradients."""
        if torch.compiler.is_dynamo_compiling():
            return self._product_in_trace(place, x)
        calls = _CALLS.open
        if not calls or calls[-1].parent is not self._parent:
            return self._alone[place].of(x)[0]
        version = -1
        if not x.is_inference():
            version = x._version
        elif any(self._hooks):
            return self._alone[place].of(x)[0]
        state = (version, self._switches.count, torch.is_inference_mode_enabled())
        waiting = calls[-1].waiting.get(self)
        if waiting is not None and waiting.x is x and waiting.state == state:
            y = waiting.results.pop(place, None)
            if y is not None:
                self._wasted -= 1
                return y
        if self._wasted > _WASTE:
            self.together = False
            return self._alone[place].of(x)[0]
        results = dict(enumerate(self._all.of(x)))
        y = results.pop(place)
        self._wasted += len(results)
        calls[-1].waiting[self] = _Waiting(x, state, results)
        return y

    def _product_in_trace(self, place: int, x: Tensor) -> Tensor:
        """The same while torch.compile traces, which cannot read versions."""
        parent = self._parent
        if not parent.under_way:
            return self._alone[place].of(x)[0]
        traced = parent.traced
        if traced is not None and traced[0] is self and traced[1] is x:
            results = traced[2]
            y = results.pop(place, None)
            if not results:
                parent.traced = None
            return self._alone[place].of(x)[0] if y is None else y
        results = dict(enumerate(self._all.of(x)))
        y = results.pop(place)
        parent.traced = (self, x, results)
        return y


class _Waiting:
    __slots__ = ("results", "state", "x")

    def __init__(self, x: Tensor, state: tuple[int, int, bool], results: dict[int, Tensor]) -> None:
        self.x = x
        self.state = state
        self.results = results


def families(names: Mapping[str, M]) -> Iterator[tuple[str, tuple[M, ...]]]:
    """Layers that share an input, of layers by their full names, and the name of their parent."""
    for name, layer in names.items():
        parent, _, child = name.rpartition(".")
        for family in FAMILIES:
            if child != family[0] or any(part in parent.lower() for part in APART):
                continue
            found = [names.get(f"{parent}.{other}" if parent else other) for other in family]
            layers = tuple(layer for layer in found if layer is not None)
            alike = {(layer.weight.value.columns, layer.weight.value.group) for layer in layers}
            if len(set(layers)) == len(family) and len(alike) == 1:
                yield parent, layers


def hooked_parents(model: nn.Module, names: Mapping[str, PlaneModule]) -> dict[str, Parent]:
    """Put hooks on the parent of each family, or on the module around it where it is a mere container.

    Returns:
        What the siblings know of each parent's calls, by the parent's name.
    """
    made: dict[int, Parent] = {}
    parents: dict[str, Parent] = {}
    for name in dict.fromkeys(name for name, _ in families(names)):
        module = model.get_submodule(name)
        around = name
        while isinstance(module, (nn.ModuleDict, nn.ModuleList)) and around:  # these are never called
            around = around.rpartition(".")[0]
            module = model.get_submodule(around)
        if id(module) not in made:
            made[id(module)] = parent = Parent()
            module.register_forward_pre_hook(parent.begin)
            module.register_forward_hook(parent.end, always_call=True)
        parents[name] = made[id(module)]
    if parents:
        model.register_forward_pre_hook(begin_pass, prepend=True)
    return parents


def unhook(model: nn.Module) -> None:
    """Take every hook of `hooked_parents` off a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if hook is begin_pass or isinstance(getattr(hook, "__self__", None), Parent):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)
