"""Shadow runs: a small sample of the stream is run again with all planes and with candidate maps, and compared.

The divergence from the run with all planes needs no labels. The sample holds the latest calls that can be repeated: one
sequence of each, without a cache that already holds tokens. Inputs have the levels of the map in force in every run,
so that only weights are compared.

A shadow run moves the levels of the whole model, between two passes of this thread, under a name of its own, which is
withdrawn at the end. Passes that other threads begin meanwhile read its maps too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import Objective, infer
from foveate.errors import FloorError
from foveate.nn.levels import apply, withdraw
from foveate.nn.registry import Registry
from foveate.precision.maps import PrecisionMap
from foveate.precision.sites import Levels

#: Keywords that hold what earlier calls left, in releases of transformers old and new; a call is repeated without them.
_CACHES = ("cache", "past_key_values", "cache_params", "past_key_value", "cache_position")
_DECIDER = "importance, shadow"


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A call that can be repeated: its arguments, and how many tokens it has."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tokens: int


class Sample:
    """The latest calls of a stream.

    Args:
        calls: how many are kept.
        tokens: the most tokens of one call; a call of more is not kept.
    """

    def __init__(self, calls: int, tokens: int) -> None:
        self._calls: deque[Call] = deque(maxlen=calls)
        self._most = tokens

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Any:
        return iter(tuple(self._calls))

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep a copy of the first sequence of a call, if it can be repeated."""
        call = repeatable(args, kwargs, self._most)
        if call is not None:
            self._calls.append(call)


def tokens_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many tokens, or rows, a model is called with, by its first tensor; 0 if there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            if value.dim() == 1 or (value.dim() == 2 and value.is_floating_point()):
                return value.shape[0]
            return value.shape[0] * value.shape[1] if value.dim() < 4 else value.shape[0]
    return 0


def repeatable(args: tuple[Any, ...], kwargs: Mapping[str, Any], most: int) -> Call | None:
    """A copy of the first row of a call; None if it depends on earlier calls, or has more than `most` tokens."""
    rest = {name: value for name, value in kwargs.items() if name not in _CACHES}
    for name in _CACHES:
        value = kwargs.get(name)
        if value is not None and name != "cache_position" and _length(value) != 0:
            return None
    if rest.get("use_cache"):
        rest["use_cache"] = False
    first = next((v for v in (*args, *rest.values()) if isinstance(v, Tensor) and v.dim()), None)
    if first is None or not len(first):
        return None
    count = len(first)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        many = value.dim() > 0 and value.shape[0] == count
        return (value[:1] if many else value).detach().clone()

    taken = tuple(cut(value) for value in args), {name: cut(value) for name, value in rest.items()}
    tokens = tokens_of(*taken)
    return Call(args=taken[0], kwargs=taken[1], tokens=tokens) if 0 < tokens <= most else None


def _length(cache: Any) -> int:
    """How many tokens a cache holds; 1 where it does not say."""
    count = getattr(cache, "get_seq_length", None)
    try:
        return int(count()) if callable(count) else 1
    except (TypeError, ValueError):
        return 1


def all_planes(registry: Registry, present: PrecisionMap) -> PrecisionMap:
    """The map that reads every plane and exact tile that is there; inputs as in `present`."""
    levels: dict[str, Levels] = dict(present.levels)
    for name, weight in registry.weights.items():
        levels[name] = bytes(weight.value.highest_levels.flatten().tolist())
    return replace(present, levels=levels, predicted_loss=math.nan)


def divergences(
    model: nn.Module,
    registry: Registry,
    sample: Sequence[Call],
    maps: Mapping[str, PrecisionMap],
    objective: Objective | None,
) -> dict[str, float]:
    """The mean divergence of each map from the run with all planes; infinite where a standing floor forbids the map.

    Args:
        model: the quantized module.
        registry: its registry.
        sample: the calls to repeat.
        maps: the candidates.
        objective: how outputs are compared; inferred from the first if None.
    """
    sums, rows = dict.fromkeys(maps, 0.0), 0
    passes = registry.generations.passes
    classes = passes.set_rows(None)
    present = registry.plan
    assert present is not None
    reference = all_planes(registry, present)
    inputs = {site.name: present.levels[site.name] for site in present.sites if site.kind != "weight"}
    compared = {name: replace(plan, levels={**plan.levels, **inputs}) for name, plan in maps.items()}
    try:
        with evaluating(model), torch.no_grad():
            for call in sample:
                try:
                    apply(model, reference, decider=_DECIDER)
                except FloorError:  # planes that a floor needs are not in memory: nothing can be compared
                    return dict.fromkeys(maps, math.inf)
                output = model(*call.args, **call.kwargs)
                objective = objective or infer(output)
                wanted = objective.outcome(output, call.kwargs)
                rows += len(wanted)
                for name, plan in compared.items():
                    try:
                        apply(model, plan, decider=_DECIDER)
                    except FloorError:
                        sums[name] = math.inf
                        continue
                    got = objective.outcome(model(*call.args, **call.kwargs), call.kwargs)
                    sums[name] += float(objective.divergence(wanted, got).double().sum())
    finally:
        withdraw(model, _DECIDER)
        passes.set_rows(classes)
    return {name: value / rows if rows and not math.isnan(value) else math.inf for name, value in sums.items()}
