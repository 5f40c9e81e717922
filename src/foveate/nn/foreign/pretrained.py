"""Refusing `save_pretrained` on models of transformers that are on planes.

`save_pretrained` would write planes under names that `from_pretrained` does not know. Loading such a folder would give
random weights in place of the planes. So every transformers model within a quantized model refuses to be saved so, and
its message says what to call. Only these objects are changed, not their classes: adapters beside a model can still be
saved.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from foveate.errors import FoveateError

_SAVING = ("save_pretrained", "push_to_hub")


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise FoveateError(
        "save_pretrained cannot store a model on planes: from_pretrained would give its weights random values. Use "
        "foveate.save(model, folder) and foveate.load(folder)"
    )


def refuse_saving(model: nn.Module) -> None:
    """Make all transformers models within this one refuse `save_pretrained` and `push_to_hub`."""
    for module in model.modules():
        if _is_pretrained(module):
            # a function of this module, so that copies and pickles of a model refuse as well
            module.__dict__.update(dict.fromkeys(_SAVING, _refuse))


def allow_saving(model: nn.Module) -> None:
    """Undo `refuse_saving`."""
    for module in model.modules():
        for name in _SAVING:
            if module.__dict__.get(name) is _refuse:
                del module.__dict__[name]


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        kind.__module__.startswith("transformers.") and "save_pretrained" in kind.__dict__
        for kind in type(module).__mro__
    )
