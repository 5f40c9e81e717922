"""Models whose batch norms were folded into the layers before them: which ones, and the same change to a skeleton.

`foveate.prepare.fold` folds them. A folder stores the names, so that a model that is to be loaded, whose modules are
still as its class makes them, can be given biases and lose its norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from foveate.collect.kinds import Kind, kind_of
from foveate.errors import CheckpointError

_ATTRIBUTE = "_foveate_folded"


def _is_norm(module: nn.Module) -> bool:
    return type(module).forward is nn.BatchNorm2d.forward and isinstance(module, nn.modules.batchnorm._BatchNorm)


def _remove_norms(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    folded = {id(model.get_submodule(norm)) for _, norm in pairs}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in folded:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity().train(module.training))


def folded_of(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """(layer, norm) of each norm that was folded into a layer of this model."""
    return tuple(model.__dict__.get(_ATTRIBUTE, ()))


def fold_skeleton(model: nn.Module, pairs: Any) -> None:
    """Give a model that is yet to be filled the modules that a folded model has: layers with biases, and no norms.

    Args:
        model: the skeleton.
        pairs: what `folded_of` gave for the model that was saved, as read from JSON.

    Raises:
        CheckpointError: the pairs are malformed, or not of this model.
    """
    try:
        named = tuple((str(layer), str(norm)) for layer, norm in pairs)
        for layer_name, norm_name in named:
            layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
            if kind_of(layer) not in (Kind.LINEAR, Kind.LINEAR_TRANSPOSED, Kind.CONV):
                raise AttributeError(f"{layer_name} is a {type(layer).__name__}")
            if not isinstance(norm, nn.Identity) and not _is_norm(norm):
                raise AttributeError(f"{norm_name} is a {type(norm).__name__}")
            if layer.bias is None:
                rows = layer.out_channels if kind_of(layer) is Kind.CONV else cast(Any, norm).num_features
                layer.bias = nn.Parameter(torch.empty(rows, device="meta"))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint has norms folded that the model does not have: {error}") from error
    _remove_norms(model, named)
    model.__dict__[_ATTRIBUTE] = named
