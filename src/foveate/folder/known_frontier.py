"""frontier_of: the frontier that a model was loaded with."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import nn

from foveate.errors import FoveateError
from foveate.nn.registry import quantized_part
from foveate.precision.frontiers import Frontier

_ATTRIBUTE = "_foveate_frontier"


def frontier_of(model: nn.Module) -> Frontier:
    """The frontier that the folder of a model holds. It is read when it is first asked for.

        model = fv.load("out/")
        chain = fv.frontier_of(model)
        fv.apply(model, chain[chain.find("4.25")])

    A model that was loaded without some planes has the whole frontier all the same; `foveate.apply` refuses the maps
    that read planes which were not loaded.

    Raises:
        FoveateError: the model is not quantized, or its folder holds no frontier.
        CheckpointError: the frontier is damaged, or another save has replaced it since the model was loaded.
    """
    found = known_frontier(model)
    if found is None:
        raise FoveateError(
            "the model was loaded without a frontier: foveate.frontier(profile, 64) makes one, and "
            "foveate.save(model, path, frontier=...) stores it"
        )
    return found


def known_frontier(model: nn.Module) -> Frontier | None:
    """The frontier of a model, or None without one; errors as for `frontier_of`."""
    own = quantized_part(model).__dict__
    found = own.get(_ATTRIBUTE)
    if found is not None and not isinstance(found, Frontier):
        found = own[_ATTRIBUTE] = cast("Callable[[], Frontier]", found)()
    return found


def keep_frontier(model: nn.Module, source: Callable[[], Frontier]) -> None:
    """Let a model know the function that reads its frontier."""
    quantized_part(model).__dict__[_ATTRIBUTE] = source
