"""Where deciders move the levels of a live model: `apply`, `set_index`, `floor`, `row_precision`, `withdraw`.

Each changes its decider's part of one frozen state (`foveate.precision.state.LevelState`), from which the levels are
composed and published whole: every pass reads one generation from beginning to end (`foveate.nn.generations`). Nothing
else writes the levels of a live model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from foveate.errors import BudgetError, FoveateError
from foveate.formats.levels import TOP_LEVEL
from foveate.nn.registry import profile_of, registry_of
from foveate.precision.adaptation import Adaptation
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap, input_level_for, uniform
from foveate.precision.state import Floor, LevelState, Request

#: The decider that `apply`, and everything else that a user calls without a name, decides for.
USER = "user"
_NUMBERS = itertools.count(1)


def apply(model: nn.Module, plan: PrecisionMap | Frontier, *, decider: str = USER) -> None:
    """Read the model at the levels of a map, or of a chain of maps, from the next pass on.

    No plane is moved or repacked: one byte a tile is written, which takes microseconds, or milliseconds for billions of
    weights. Passes that have begun, in this thread or another, go on with the levels that they began with.

        fv.apply(model, profile.uniform(4))
        fv.apply(model, fv.frontier(profile, 64))  # at its best map; `set_index` moves along it

    Args:
        model: a quantized model.
        plan: the map, or the frontier.
        decider: who decides; a decider's frontier takes the place of the one it gave before.

    Raises:
        SiteError: the map is of another model.
        PlaneNotResidentError: the map reads planes that are not stored, for they were not loaded or not kept; nothing
            was changed.
        FloorError: a floor that stands cannot be met.
    """
    registry_of(model).apply(plan, decider)


def set_index(model: nn.Module, index: int, *, decider: str = USER) -> None:
    """Demand an index of the frontier in force. The furthest that any decider demands counts, up to the floors.

    Raises:
        BudgetError: the frontier has no such index.
    """
    registry_of(model).change(lambda now: now.with_index(decider, index))


def set_raises(model: nn.Module, raises: Mapping[str, int], *, decider: str) -> None:
    """Read inputs by some steps of 4, 8 and 16 bits above the level of their map; while any is, no static range counts.

    Args:
        model: a quantized model.
        raises: the steps of each input that is raised, by its site's name.
        decider: who decides.
    """
    registry_of(model).change(lambda now: now.with_raises(decider, raises))


def set_adaptation(model: nn.Module, adaptation: Adaptation, *, decider: str) -> None:
    """Let every input choose between two maps around the index in force (`foveate.adapt_to_input` finds the price).

    Raises:
        PlaneNotResidentError: the higher map reads planes that are not stored.
    """
    registry_of(model).change(lambda now: now.with_adaptation(decider, adaptation))


def withdraw(model: nn.Module, decider: str) -> None:
    """Take back all that a decider gave. What is left is what would have been without it."""
    registry_of(model).change(lambda now: now.without(decider))


def state_of(model: nn.Module) -> LevelState:
    """What each decider gave, by its name.

    >>> fv.state_of(model).index
    """
    state = registry_of(model).generations.state
    if state is None:
        raise FoveateError("the model has no levels yet: apply a map first")
    return state


@contextmanager
def floor(
    model: nn.Module, *, bits: float | None = None, index: int | None = None, decider: str | None = None
) -> Iterator[None]:
    """Within this context no index goes beyond a floor, whoever demands it.

        with fv.floor(model, bits=6):
            model.generate(**inputs)

    Args:
        model: a quantized model.
        bits: the least average bits of the weights, scales included; or
        index: the furthest index of the frontier in force.
        decider: a name for the floor, as it shows in `state_of`; one is made if not given.

    Raises:
        FloorError: the frontier in force cannot meet it; or, from a later `apply`, the new frontier cannot.
    """
    name = decider or f"floor {next(_NUMBERS)}"
    set_floor(model, Floor(bits=bits, index=index), decider=name)
    try:
        yield
    finally:
        withdraw(model, name)


@contextmanager
def row_precision(model: nn.Module, requests: Sequence[Request | None]) -> Iterator[None]:
    """Within this context, and in this thread, the rows of every batch are read at precisions of their own.

        with fv.row_precision(model, [None, fv.Request(tier=0), fv.Request(floor=fv.Floor(bits=4.25))]):
            model(input_ids)  # three sequences

    Products of planes give each row the bits that it has alone. A layer for whose rows it is not known which of the
    batch they belong to reads the best of the maps in use, unless all rows ask for the same: that is so where neither
    the first dimension is that of the batch, nor all tokens of all sequences are there, sequence by sequence.

    Args:
        model: a quantized model.
        requests: for each row of the batch what it asks for; None follows the index in force. For packed sequences, one
            for each token.

    Raises:
        FloorError: a floor cannot be met.
        BudgetError: the requests need more than 8 different maps at once, or no requests are given.
    """
    if not requests:
        raise BudgetError("no requests are given: one for each row of the batch, or None")
    name, generations = f"rows {next(_NUMBERS)}", registry_of(model).generations
    asked = [request for request in requests if request is not None]
    set_classes(model, asked, decider=name)

    def classes() -> list[int]:
        # their numbers change where others, in other threads, come and go
        numbers = class_numbers(model, asked, decider=name)
        return [0 if request is None else numbers[request] for request in requests]

    before = generations.passes.set_rows(classes)
    try:
        yield
    finally:
        generations.passes.set_rows(before)
        set_classes(model, (), decider=name)


def set_floor(model: nn.Module, wanted: Floor, *, decider: str) -> None:
    """Let a floor stand until its decider withdraws; in place of one that the decider gave before.

    Raises:
        FloorError: the frontier in force cannot meet it.
    """
    registry_of(model).change(lambda now: now.with_floor(decider, wanted))


def set_classes(model: nn.Module, requests: Iterable[Request], *, decider: str) -> Mapping[Request, int]:
    """Let there be a class of rows for each of some requests, in place of those that the decider gave before.

    A server calls it where the requests of a step differ from those of the step before; `row_precision` is for a batch
    that is computed once.

    Args:
        model: a quantized model.
        requests: at most 7 different maps beside the index in force.
        decider: who decides.

    Returns:
        The number of the class of each request, as `set_row_classes` takes it. It holds until the next call.

    Raises:
        FloorError: a floor cannot be met.
        BudgetError: the requests need more than 8 different maps at once.
    """
    names = _class_names(requests, decider)

    def changed(now: LevelState) -> LevelState:
        for name in now.requests:
            if name.rpartition(" ")[0] == decider:
                now = now.without(name)
        for request, name in names.items():
            now = now.with_request(name, request)
        return now

    classes = registry_of(model).change(changed).classes
    return {request: classes[name] for request, name in names.items()}


def class_numbers(model: nn.Module, requests: Iterable[Request], *, decider: str) -> Mapping[Request, int]:
    """The numbers that the classes of a decider's requests have now; 0, the index in force, for those that are gone."""
    state = registry_of(model).generations.state
    classes = {} if state is None else state.classes
    return {request: classes.get(name, 0) for request, name in _class_names(requests, decider).items()}


def _class_names(requests: Iterable[Request], decider: str) -> dict[Request, str]:
    """The name that each of a decider's requests has in the state."""
    return {request: f"{decider} {number}" for number, request in enumerate(dict.fromkeys(requests))}


def set_row_classes(model: nn.Module, classes: Sequence[int] | None) -> None:
    """Give each row of this thread's next passes a class (`set_classes`), 0 for the index in force; None ends that.

    Args:
        model: a quantized model.
        classes: for each row of the batch, or for each token of packed sequences.
    """
    registry_of(model).generations.passes.set_rows(classes)


def use_static_scales(model: nn.Module, on: bool = True) -> None:
    """Quantize inputs at levels 4 and 8 by the range that calibration saw at each input, not by each row's own.

    A static scale saves the search for each row's greatest value. The CPU's kernels gain no time by that; other
    machines do. Where rows differ, a static scale loses more than a scale for each row. It also clips values beyond
    the range that calibration saw, which `foveate.watch_inputs` detects. At levels 16 and 32 every row keeps its own
    scale. `foveate.save` stores the choice.

    Args:
        model: a quantized model, with its profile.
        on: False goes back to a scale for each row, which is the default.

    Raises:
        FoveateError: the profile is missing, or was made by a foveate that did not measure inputs.
    """
    registry = registry_of(model)
    ranges: dict[str, tuple[float, float]] = {}
    if on:
        for name, kept in profile_of(model).statistics.items():
            if name in registry.inputs and "range" in kept:
                low, high = kept["range"].tolist()
                ranges[name] = (low, high)
        if registry.inputs and not ranges:
            raise FoveateError("the profile has no ranges of inputs: quantize the original again")
    registry.set_ranges(ranges)


def current_map(model: nn.Module) -> PrecisionMap:
    """The map in force, for rows for which nothing was asked; `state_of` says who decided what."""
    plan = registry_of(model).plan
    assert plan is not None
    return plan


def highest_map(model: nn.Module) -> PrecisionMap:
    """The map in which every tile has the highest level that is loaded."""
    registry = registry_of(model)
    plan = uniform(registry.sites, 0, registry.other_bytes, input_level_for(TOP_LEVEL))
    levels = {name: bytes(w.value.highest_levels.flatten().tolist()) for name, w in registry.weights.items()}
    return replace(plan, levels={**plan.levels, **levels}, other_parameters=registry.other_parameters)
