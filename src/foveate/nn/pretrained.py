"""What transformers' models can do that they cannot on planes: be saved by `save_pretrained`.

It would write planes under names that `from_pretrained` does not know, and that would load the rest with random weights
in their places. So the models that a quantized one is made of refuse it, and say what to call. Only these objects do:
nothing of transformers is changed, and what saves adapters beside a model still does.
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
    """Let all transformers models in this one refuse `save_pretrained` and `push_to_hub`."""
    for module in model.modules():
        if _is_pretrained(module):
            # functions of this module, so that copies and pickles of a model refuse as well
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
