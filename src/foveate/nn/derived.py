"""Modules with a forward of their own around a linear map, an embedding or a convolution.

Gemma's embedding is `super().forward(ids) * scale`, OPT's positions are looked up at `ids + 2`. The product in the
middle can be on planes all the same. So such a module is split in two while a model is quantized: it keeps its class's
forward and everything else, and its weight and bias go to a part of it, `product`, which is plainly what it was derived
from. Its class is exchanged for a subclass in which `super().forward` leads to that part:

    class GemmaScaledEmbedding(nn.Embedding)         forward: super().forward(ids) * scale
    class _(GemmaScaledEmbedding, _Apart)            weight, bias: those of `product`
    class _Apart(nn.Embedding)                       forward: product(ids)

To whoever finds, measures, rounds and exchanges weights, a product is a module like any other, and its site has the
name of the module that it is part of. Whether a forward calls the one it was derived from, or reads the weight itself,
is seen while the model runs (`foveate.collect.reads`); where no planes came, the module is put back together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from foveate.collect.kinds import PRODUCT, derived_from
from foveate.nn.plane_module import PlaneModule

_OWN = ("weight", "bias")
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _class_apart(derived: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `derived` whose product is a part of its own, one for each class."""
    if derived not in _CLASSES:

        def forward(self: Any, input: Tensor) -> Tensor:
            out: Tensor = self._modules[PRODUCT](input)
            return out

        def reduced(self: Any, protocol: int) -> Any:
            return _remade, (derived, base), self.__dict__

        def of_product(name: str) -> property:
            return property(lambda self: getattr(self._modules[PRODUCT], name))

        between = type("_Apart", (base,), {"forward": forward})
        own = {"__module__": derived.__module__, "__qualname__": derived.__qualname__, "__reduce_ex__": reduced}
        parts = {name: of_product(name) for name in _OWN}
        _CLASSES[derived] = type(derived.__name__, (derived, between), {**own, **parts})
    return _CLASSES[derived]


def _remade(derived: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """An empty one, for copies and pickles to fill."""
    kind = _class_apart(derived, base)
    return kind.__new__(kind)


def _split(module: nn.Module, base: type[nn.Module]) -> None:
    product = base.__new__(base)
    product.__dict__.update(module.__dict__)
    for key, value in product.__dict__.items():
        if isinstance(value, (dict, OrderedDict)) and key.startswith("_"):  # parameters, buffers, parts, hooks
            product.__dict__[key] = type(value)()
    product._parameters = {name: module._parameters.pop(name) for name in _OWN if name in module._parameters}
    module._modules[PRODUCT] = product
    module.__class__ = _class_apart(type(module), base)


def _join(module: nn.Module, derived: type[nn.Module]) -> None:
    product = module._modules.pop(PRODUCT)
    assert product is not None
    module.__class__ = derived
    module._parameters = {**product._parameters, **module._parameters}


def put_together(model: nn.Module) -> None:
    """Put back together the split modules of a model whose products are on no planes any more."""
    split = {made: derived for derived, made in _CLASSES.items()}
    for module in list(model.modules()):
        if type(module) in split and not isinstance(module._modules[PRODUCT], PlaneModule):
            _join(module, split[type(module)])


@contextmanager
def products_apart(model: nn.Module, only: frozenset[str] | None = None) -> Iterator[None]:
    """Split the modules that have a forward of their own, and put back together whatever holds no planes at the end.

    Args:
        model: any module.
        only: names of the modules to split; all that can be if not given.
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
