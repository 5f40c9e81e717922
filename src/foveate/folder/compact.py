"""compact: planes that a live model does not read are dropped, and their memory goes back to the system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.memory.allocator import given_back
from foveate.nn.registry import Registry, quantized_part, registry_of, tiles_of
from foveate.nn.residency.registry import ResidentRegistry
from foveate.planes import PlaneTensor, gathered, highest, rounded_up
from foveate.precision.maps import PrecisionMap, uniform


def compact(model: nn.Module, keep: PrecisionMap | int | None = None) -> int:
    """Drop the planes that a model does not read, zeroed tiles whole, and give their memory back to the system.

    What stays is rewritten without gaps, so that products read it in order. The model computes what it computed before,
    to the bit. What was dropped comes back only from a folder: a later map that reads it is refused. No call of the
    model may be running. While this works, memory holds the old planes and those that stay.

        fv.apply(model, fv.allocate(profile, fv.Budget(bits=3.0), fv.Constraints(levels=(0, 2, 3, 4))))
        fv.compact(model)  # bytes that were given back

    Args:
        model: a quantized model, all of whose planes are in memory.
        keep: what stays readable: a map, or a level for all weights (or what they have, where that is less). If not
            given, what is read now, by all deciders and requests together.

    Returns:
        The bytes that were given back.

    Raises:
        LevelError: `keep` is no level.
        SiteError: `keep` is a map of another model.
        PlaneNotResidentError: `keep` reads planes that the model does not have.
        FoveateError: less would stay than is read now, or the model was loaded with `memory=`: `foveate.resize` gives
            memory back there, and takes it again. Nothing was changed.
    """
    registry = registry_of(quantized_part(model))
    if isinstance(registry, ResidentRegistry):
        raise FoveateError("the planes of this model come and go: foveate.resize gives memory back, and takes it again")
    plan = keep if keep is None or isinstance(keep, PrecisionMap) else uniform(registry.sites, keep)
    if plan is not None and plan is keep:
        registry.check(plan)
    levels = {name: _kept_levels(registry, name, plan) for name in registry.weights}
    before = sum(weight.value.nbytes() for weight in registry.weights.values())
    with given_back(True):
        _put(registry, [weight.value.kept(levels[name]) for name, weight in registry.weights.items()])
        # the old planes are gone by now, and those that stay are put in one block for each plane
        _put(registry, gathered([weight.value for weight in registry.weights.values()]))
    return before - sum(weight.value.nbytes() for weight in registry.weights.values())


def _kept_levels(registry: Registry, name: str, plan: PrecisionMap | None) -> Tensor:
    """The levels up to which the tiles of a weight stay, uint8 [NT, G]: those of a map, as far as the weight has them,
    or those that are read now.
    """
    value = registry.weights[name].value
    stored, most = value.stored_levels, highest(value.stored_levels, value.exact)
    exact = torch.zeros_like(stored) if value.exact is None else value.exact.levels()
    composed = registry.generations.composed
    read = torch.zeros_like(stored)
    for one in () if composed is None else composed.maps:
        read = torch.maximum(read, rounded_up(tiles_of(one, name, stored), stored, exact))
    if plan is None:
        return read
    levels = rounded_up(tiles_of(plan, name, stored).minimum(most), stored, exact)
    if bool((levels < read).any()):
        raise FoveateError(
            f"{name}: keep leaves some of its tiles {int(levels[levels < read].min())} bits, and more is read now: "
            "apply a map first that reads no more"
        )
    return levels


def _put(registry: Registry, values: Sequence[PlaneTensor]) -> None:
    for weight, value in zip(registry.weights.values(), values, strict=True):
        # the block of active levels is the map's in force, and stays
        weight.set(replace(value, active_levels=weight.value.active_levels))
        for user in tuple(weight.users):
            user.renew()
