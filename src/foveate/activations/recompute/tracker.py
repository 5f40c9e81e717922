"""Finds recipes while a forward pass runs: which tensors can be computed again, and how (see `recipes.py`)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.activations.forms.identity import interval_of, parameter_of
from foveate.activations.measure.scope import Call
from foveate.activations.recompute.recipes import (
    DEPTH,
    NORMS,
    Parameter,
    Recipe,
    StoredView,
    norm_arguments,
    normalised,
)
from foveate.activations.saved_tensors import Payload, RecomputedFunction, is_plain, stored_view


class RecipeTable:
    """The recipes of one forward pass, by the storage of their results.

    Args:
        stored: finds the payload that stores a tensor's values.
    """

    def __init__(self, stored: Callable[[Tensor], Payload | None]) -> None:
        self._stored = stored
        self._by_storage: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, Recipe]] = {}

    def find(self, tensor: Tensor) -> Recipe | None:
        """The recipe whose result lies in the tensor's storage, at its version."""
        found = self._by_storage.get(tensor.untyped_storage()._cdata)
        if found is None or found[1] != tensor._version or found[2].dtype != tensor.dtype:
            return None
        return found[2]

    def clear(self) -> None:
        """Forget all recipes: the forward pass is over."""
        self._by_storage.clear()

    def note(self, call: Call, result: Tensor) -> None:
        """Add the recipe of a cheap function's result, if all its arguments are stored, parameters, or recipes."""
        if not (result.requires_grad and is_plain(result) and _is_whole(result)):
            return
        storage = result.untyped_storage()
        tensors = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]
        if any(not is_plain(t) or t.untyped_storage()._cdata == storage._cdata for t in tensors):
            return  # a function in place, or an argument without ordinary memory
        if torch.is_autocast_enabled(result.device.type) and any(t.dtype != result.dtype for t in tensors):
            return  # autocast casts an argument, and is off in backward
        made = self._norm(call, result) if call.function in NORMS else self._plain(call)
        if made is None:
            return
        function, args, kwargs = made
        found = [a for a in (*args, *kwargs.values()) if isinstance(a, (StoredView, Recipe))]
        depth = 1 + max((_depth_of(a) for a in found), default=0)
        roots = tuple(dict.fromkeys(root for a in found for root in _roots_of(a)))
        if roots and depth <= DEPTH:
            recipe = Recipe(function, args, kwargs, result.shape, result.stride(), result.dtype, depth, roots)
            key = storage._cdata
            known = self._by_storage
            alive = weakref.ref(storage, lambda _: known.pop(key, None) and None)
            known[key] = (alive, result._version, recipe)

    def _plain(self, call: Call) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
        """An elementwise function, and its arguments as a recipe holds them; None if one is not recoverable."""
        args = tuple(self._recoverable(a) for a in call.args)
        kwargs = {name: self._recoverable(a) for name, a in call.kwargs.items()}
        if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            return None
        return call.callable, args, kwargs

    def _norm(self, call: Call, result: Tensor) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
        """A norm, applied with the statistics that it saved. `torch.batch_norm` has none: the order of its arguments is
        not that of `F.batch_norm`.
        """
        if call.callable is torch.batch_norm:
            return None
        given = norm_arguments(call.args, call.kwargs, call.function)
        statistics = [source for source in call.packed[1:] if not source.item.lossy][-2:]
        if len(statistics) < 2 or not given.get("training", True) or torch.is_autocast_enabled(result.device.type):
            return None
        x, weight, bias = (self._recoverable(given.get(name)) for name in ("input", "weight", "bias"))
        if any(isinstance(a, Tensor) for a in (x, weight, bias)):
            return None
        return normalised, (x, *statistics, weight, bias, call.function == "batch_norm"), {}

    def _recoverable(self, argument: Any) -> Any:
        """The stored view, recipe or parameter that gives a tensor again; the argument itself if there is none."""
        if not isinstance(argument, Tensor):
            return argument
        origin = parameter_of(argument)
        if origin is not None:
            return Parameter(argument.detach(), argument._version) if origin.views_only else argument
        payload = self._stored(argument)
        if payload is not None:
            return stored_view(payload, argument)
        recipe = self.find(argument)
        same = recipe is not None and (recipe.shape, recipe.stride) == (argument.shape, argument.stride())
        return recipe if same else argument


def _is_whole(result: Tensor) -> bool:
    """Whether a tensor fills its storage, so that every view of the storage is a view of the tensor."""
    interval = interval_of(result)
    return interval.dense and interval.length * result.element_size() == result.untyped_storage().nbytes()


def _depth_of(found: StoredView | Recipe) -> int:
    """How many functions lie between the stored payloads and an argument."""
    if isinstance(found, Recipe):
        return found.depth
    return found.item.encoding.recipe.depth if isinstance(found.item.encoding, RecomputedFunction) else 0


def _roots_of(found: StoredView | Recipe) -> tuple[Any, ...]:
    """The payloads that an argument is computed from in the end."""
    if isinstance(found, Recipe):
        return found.roots
    return found.item.encoding.recipe.roots if isinstance(found.item.encoding, RecomputedFunction) else (found.item,)
