"""Modules with a forward of their own around a linear map, an embedding or a convolution.

The forward of Gemma's embedding is `super().forward(ids) * scale`; OPT looks up positions at `ids + 2`. The look-up in
the middle can be on planes nevertheless. So such a *derived module* is split in two while a model is quantized. It
keeps the forward of its class and everything else, but its weight and bias move to an *inner module*, a child named
`product`, which is a plain instance of the base class. The class of the derived module is replaced by a subclass in
which `super().forward` calls the inner module:

    class GemmaScaledEmbedding(nn.Embedding)         forward: super().forward(ids) * scale
    class _(GemmaScaledEmbedding, _CallsInner)       weight, bias: those of the inner module
    class _CallsInner(nn.Embedding)                  forward: self.product(ids)

The code that finds, measures, rounds and replaces weights treats an inner module like any other module. Its site has
the name of the derived module. A forward may also read the weight itself and not call the base's forward; this is found
while the model runs (`foveate.collect.reads`). Where the inner module was not replaced by one on planes, the derived
module is joined again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from foveate.collect.kinds import PRODUCT, derived_from
from foveate.nn.plane_module import PlaneModule

_MOVED = ("weight", "bias")  # the parameters that move to the inner module
_SPLIT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _split_class(derived: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `derived` whose `super().forward` calls its inner module; one is made for each class."""
    if derived not in _SPLIT_CLASSES:

        def forward(self: Any, input: Tensor) -> Tensor:
            out: Tensor = self._modules[PRODUCT](input)
            return out

        def reduced(self: Any, protocol: int) -> Any:
            return _empty_instance, (derived, base), self.__dict__

        def of_inner(name: str) -> property:
            return property(lambda self: getattr(self._modules[PRODUCT], name))

        calls_inner = type("_CallsInner", (base,), {"forward": forward})
        own = {"__module__": derived.__module__, "__qualname__": derived.__qualname__, "__reduce_ex__": reduced}
        moved = {name: of_inner(name) for name in _MOVED}
        _SPLIT_CLASSES[derived] = type(derived.__name__, (derived, calls_inner), {**own, **moved})
    return _SPLIT_CLASSES[derived]


def _empty_instance(derived: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """An instance without any attributes, which copy and pickle then fill."""
    kind = _split_class(derived, base)
    return kind.__new__(kind)


def _split(module: nn.Module, base: type[nn.Module]) -> None:
    inner = base.__new__(base)
    inner.__dict__.update(module.__dict__)
    for key, value in inner.__dict__.items():
        if isinstance(value, (dict, OrderedDict)) and key.startswith("_"):  # parameters, buffers, children, hooks
            inner.__dict__[key] = type(value)()
    inner._parameters = {name: module._parameters.pop(name) for name in _MOVED if name in module._parameters}
    module._modules[PRODUCT] = inner
    module.__class__ = _split_class(type(module), base)


def _join(module: nn.Module, derived: type[nn.Module]) -> None:
    inner = module._modules.pop(PRODUCT)
    assert inner is not None
    module.__class__ = derived
    module._parameters = {**inner._parameters, **module._parameters}


def join_derived(model: nn.Module) -> None:
    """Join the derived modules of a model whose inner modules are not on planes any more."""
    split = {made: derived for derived, made in _SPLIT_CLASSES.items()}
    for module in list(model.modules()):
        if type(module) in split and not isinstance(module._modules[PRODUCT], PlaneModule):
            _join(module, split[type(module)])


@contextmanager
def split_derived(model: nn.Module, only: frozenset[str] | None = None) -> Iterator[None]:
    """Split derived modules; on leaving, join those whose inner modules are not on planes.

    Args:
        model: any module.
        only: names of the modules to split; if not given, all that can be split.
    """
    bases = {name: (module, derived_from(module)) for name, module in model.named_modules() if name}
    split: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, (module, base) in bases.items():
        if base is not None and (only is None or name in only) and "forward" not in module.__dict__:
            split.append((module, type(module)))
            _split(module, base)
    try:
        yield
    finally:
        for module, derived in split:
            if not isinstance(module._modules[PRODUCT], PlaneModule):
                _join(module, derived)
