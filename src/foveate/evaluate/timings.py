"""Times of a live model: one token or sample alone, a whole batch, and each product at each level.

A language model is timed as it decodes: a short prompt fills a key/value cache, and then one token after another is
computed with nothing beside it. Any other model is called on the first sample of a batch.

A product is timed with weights of random codes in place of the model's, since codes do not change its time. As many
copies as the model has bytes are read in turn, so that caches hold as much of them as they hold of the model. A weight
of more than 16 million numbers is timed on its first rows, and its time is scaled. What a product takes at level 0,
where no plane is read, is the cost of its call; it belongs to the rest of the token, which layers that share an input
pay once. Each time is the least of several rounds, since other work on the machine can only add to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import run
from foveate.errors import DataError
from foveate.evaluate.machine import machine_name
from foveate.formats.levels import NESTED_LEVELS, WEIGHT_LEVELS
from foveate.formats.packing import TILE_ROWS
from foveate.memory.available import free_memory
from foveate.nn.foreign.cache_argument import cache_argument, cache_of
from foveate.nn.levels import apply, highest_map, withdraw
from foveate.nn.registry import Registry, registry_of
from foveate.planes import PlaneTensor, from_codes, gathered, linear
from foveate.precision.maps import PrecisionMap, Site, input_level_for, tile_levels, uniform
from foveate.precision.timings import Timings
from foveate.progress import track

#: Tokens of the prompt before tokens are timed.
_PROMPT = 32
_LARGEST = 1 << 24  # numbers of a weight that is timed whole
_MOST_BYTES = 256 << 20  # of the copies of one weight: beyond the caches of today's processors
_SECONDS = 0.02  # of one timing of a product, at least, and as many calls as _CALLS
_CALLS = 3
#: Rounds that times are the least of; one more comes first, and warms up.
ROUNDS = 4
#: Tokens or samples in one timing of a whole model.
STEPS = 8

#: Its maps are in force while it times, and are withdrawn.
_DECIDER = "timing"


def measure_timings(model: nn.Module, batch: Any, *, progress: bool = True) -> Timings:
    """Measure how long each product of a model takes at each level on this machine, and the rest of a token.

        timings = fv.measure_timings(model, batch)
        plan = fv.allocate(fv.profile_of(model), fv.Budget(latency="30ms"))

    The timings become part of the model's profile, if it has one, and `foveate.save` stores them. They hold for the
    number of threads that torch has now, and for this machine (`Timings.machine`). The map in force is applied again at
    the end.

    Args:
        model: a quantized model.
        batch: a batch of data, as for `foveate.quantize`. A language model that generates decodes one token at a time
            after the first tokens of it; another model is called on its first sample.
        progress: whether to show a progress bar.

    Returns:
        The seconds of each weight's products at each of the levels 0, 2, 3, 4, 6 and 8, and the rest of a token.

    Raises:
        DataError: the batch has no sample.
        FoveateError: the model is not quantized.
    """
    registry = registry_of(model)
    profile = registry.profile
    try:
        with evaluating(model), torch.inference_mode():
            apply(model, highest_map(model), decider=_DECIDER)
            step = one_at_a_time(model, batch)
            uses = _uses(registry, step)
            products = _time_products(registry, uses, progress)
            timings = Timings(machine=machine_name(), products=products, rest=0.0)
            timings = replace(timings, rest=_rest(model, step, timings))
    finally:
        withdraw(model, _DECIDER)
    if profile is not None:
        registry.profile = replace(profile, timings=timings)
    return timings


def one_at_a_time(model: nn.Module, batch: Any) -> Callable[[], object]:
    """What computes one token after others, or one sample: a function to call, and to time.

    Args:
        model: any model in evaluation mode, without gradients.
        batch: as for `measure_timings`.
    """
    sample = _first_sample(batch)
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    generates = getattr(model, "can_generate", None)
    if ids is None or ids.shape[1] < 2 or not callable(generates) or not generates():
        return lambda: run(model, sample)
    output: Any = model(input_ids=ids[:, : min(_PROMPT, ids.shape[1] - 1)], use_cache=True)
    try:
        cache = cache_of(output)
    except (DataError, TypeError):
        return lambda: run(model, sample)
    last = ids[:, -1:]
    return lambda: model(input_ids=last, use_cache=True, **cache_argument(model, cache))


def seconds_of(step: Callable[[], object], count: int = 1) -> float:
    """The mean time of so many calls."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count


def _first_sample(batch: Any) -> Any:
    """The first sample of a batch, as a batch of one."""
    if isinstance(batch, Mapping):
        return {key: _first_sample(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_first_sample(part) for part in batch)
    if isinstance(batch, Tensor) and batch.dim():
        if not len(batch):
            raise DataError("the batch has no sample to time the model on")
        return batch[:1]
    return batch


@dataclass(frozen=True)
class _Shape:
    """What the time of a product depends on, beside the level."""

    rows: int
    columns: int
    group: int
    rows_of_x: int


def _uses(registry: Registry, step: Callable[[], object]) -> dict[str, list[tuple[_Shape, float]]]:
    """For each weight its products in one step: their shapes, and how often each is computed."""
    rows_of_x: dict[str, float] = {}
    hooks = []
    for name, module in registry.inputs.items():

        def count(_: Any, __: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                rows_of_x[name] = rows_of_x.get(name, 0.0) + output.numel() / sizes[name]

        hooks.append(module.register_forward_hook(count))
    weights = [site for site in registry.sites if site.kind == "weight"]
    inputs = {
        site.name: [f"{name.removesuffix(':weight')}:input" for name in (site.name, *site.aliases)] for site in weights
    }
    sizes = {name: max(site.rows, 1) for site in weights for name in inputs[site.name]}
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    spread = _spread_over_experts(weights, inputs, rows_of_x)
    found = {}
    for site in weights:
        each = [
            spread.get(site.name, rows_of_x.get(name, 0.0)) for name in inputs[site.name] if name in registry.inputs
        ]
        found[site.name] = [
            (_Shape(site.rows, site.columns, site.group, max(round(rows), 1)), min(rows, 1.0)) for rows in each
        ]
    return found


def _spread_over_experts(
    weights: Sequence[Site], inputs: Mapping[str, Sequence[str]], rows_of_x: Mapping[str, float]
) -> dict[str, float]:
    """For each expert of a mixture the rows of x that it is given on average, as calibration routed them.

    One token is routed to a few experts, and which ones is chance. So all rows that the experts of a stack were given
    are spread by the shares of rows that calibration found (`Site.rows_read`).
    """
    stacks: dict[tuple[str, str], list[Site]] = {}
    for site in weights:
        if 1 < site.rows_read < site.rows:
            path, _, last = site.name.rpartition(".")
            stacks.setdefault((path.rpartition(".")[0], last), []).append(site)
    found = {}
    for stack in stacks.values():
        given = sum(rows_of_x.get(name, 0.0) for site in stack for name in inputs[site.name])
        total = sum(site.rows_read / site.rows for site in stack)
        found.update({site.name: given * site.rows_read / site.rows / total for site in stack})
    return found


def _time_products(
    registry: Registry, uses: Mapping[str, Sequence[tuple[_Shape, float]]], progress: bool
) -> dict[str, tuple[float, ...]]:
    """The seconds of each weight's products in one step at each of WEIGHT_LEVELS."""
    size = min(uniform(registry.sites, NESTED_LEVELS[-1]).bytes_read, _MOST_BYTES, free_memory() // 4)
    shapes = dict.fromkeys(shape for products in uses.values() for shape, _ in products)
    times = {shape: _time_levels(shape, size) for shape in track(list(shapes), "timing products", show=progress)}
    return {
        name: tuple(sum(times[shape][i] * often for shape, often in products) for i in range(len(WEIGHT_LEVELS)))
        for name, products in uses.items()
    }


def _time_levels(shape: _Shape, size: int) -> list[float]:
    """The seconds that the planes of each of WEIGHT_LEVELS add to one product of a shape: 0 at level 0."""
    most = max(TILE_ROWS, _LARGEST // shape.columns // TILE_ROWS * TILE_ROWS)
    rows = min(shape.rows, most)
    copies = _copies(rows, shape.columns, shape.group, size)
    x_MK = torch.randn(shape.rows_of_x, shape.columns, generator=torch.Generator().manual_seed(0))
    rounds: list[list[float]] = []
    for _ in range(ROUNDS + 1):
        rounds.append([_time_product(copies, level, x_MK) for level in WEIGHT_LEVELS])
    least = [min(times) for times in zip(*rounds[1:], strict=True)]
    return [shape.rows / rows * max(seconds - least[0], 0.0) for seconds in least]


def _copies(rows: int, columns: int, group: int, size: int) -> list[PlaneTensor]:
    """Weights of random codes side by side in memory, as many as fill `size` bytes."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, rows, columns), generator=g, dtype=torch.uint8)
    scales = torch.full((rows, -(-columns // group)), 0.01)
    ones = torch.ones(2, 1, dtype=torch.float16)
    weight = from_codes(codes[0], codes[1], scales, torch.zeros_like(scales), ones, group=group, reach=0)
    return gathered([weight] * max(1, size // max(weight.nbytes(), 1)))


def _time_product(copies: Sequence[PlaneTensor], level: int, x_MK: Tensor) -> float:
    """The mean seconds of a product with the copies in turn, all of them read at a level."""
    for weight in copies:
        weight.active_levels.fill_(level)
    input_level = torch.full((2,), input_level_for(level), dtype=torch.uint8)
    bias = torch.empty(0)
    calls, started = 0, time.perf_counter()
    while calls < _CALLS or time.perf_counter() - started < _SECONDS:
        linear(x_MK, [copies[calls % len(copies)]], [bias], input_level)
        calls += 1
    return (time.perf_counter() - started) / calls


def _rest(model: nn.Module, step: Callable[[], object], timings: Timings) -> float:
    """The seconds of a step that no level changes: the mean, over two maps, of a whole step less its products."""
    top = highest_map(model)
    maps = (top, _lowered(top))
    taken = time_maps(model, maps, step, STEPS)
    return max(sum(t - timings.seconds_of(plan) for t, plan in zip(taken, maps, strict=True)) / len(maps), 0.0)


def time_maps(
    model: nn.Module, plans: Sequence[PrecisionMap], step: Callable[[], object], count: int, rounds: int = ROUNDS
) -> list[float]:
    """The mean seconds of a step at each of several maps, the least of rounds in which the maps take turns.

    Args:
        model: a quantized model, which is left at the last map.
        plans: the maps.
        step: what is timed.
        count: the steps in one turn.
        rounds: the rounds, after one that warms up.
    """
    least = [math.inf] * len(plans)
    for number in range(rounds + 1):
        for place, plan in enumerate(plans):
            apply(model, plan, decider=_DECIDER)
            taken = seconds_of(step, count if number else 1)
            if number:
                least[place] = min(least[place], taken)
    return least


def _lowered(plan: PrecisionMap) -> PrecisionMap:
    """The map with no tile above the lowest nested level."""
    low = NESTED_LEVELS[0]
    levels = {
        s.name: bytes(min(level, low) for level in tile_levels(plan.levels[s.name], s.tiles))
        for s in plan.weight_sites()
    }
    return replace(plan, levels={**plan.levels, **levels})
