"""Enhancements of inputs that choose, each beside plain choosing: `python -m benchmarks inputs --switch NAME`.

    feedback        thresholds are refined by what each weight does at the output (`AdaptOptions.feedback`)
    grouped         layers of a fused group decide together, by summed estimates over summed costs
    static-scales   inputs have the ranges of calibration in place of a scale for each row (`fv.use_static_scales`)
    zero-point      rows of inputs are rounded to 8 bits with a zero point in place of symmetrically
    inputs-16       inputs have 16 bits in place of 8, which is more than any form of 8 bits could gain
    bytes           the target is bytes that a token reads, those of the static map
    seconds         the target is the time of a token, that of the static map by times of this machine

The library has no switch for `grouped` and `zero-point`: hooks compute what it would (`together`, `zero_points`). Those
of `zero-point` round inputs, which the product then reads at 16 bits. So that all are compared at equal means, each
finds its price on the held-out text itself, which needs nothing of the float32 model, and keeps it. For each model and
number of bits:

    <switch>_over_static_kl_...   KL over that of the best static map of the same bits, bytes or seconds
    <switch>_over_plain_kl_...    the same over that of plain choosing at the same mean bits, the interval beside it
    <switch>_bits_...             the mean bits that were read

Legend: M rows of inputs, n samples.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.models.cases import Case
from benchmarks.quality.input_levels import rounded_rows
from foveate.bench.shared.result import Measured
from foveate.calibrate.quantize import quantize
from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import run
from foveate.errors import FoveateError
from foveate.evaluate.timings import measure_timings
from foveate.inputs.adapt import AdaptOptions, adapt_to_input, static_map
from foveate.inputs.gradients import products_of
from foveate.inputs.input_adaptation import InputAdaptation
from foveate.inputs.multiplier import Shares, solved
from foveate.inputs.observe import Observed, observing, rows_of_input
from foveate.inputs.verdict import as_decided, divergences, ratio_interval, static
from foveate.nn.fused_group import fused_groups
from foveate.nn.levels import set_raises, use_static_scales, withdraw
from foveate.nn.plane_module import NO_BIAS, PlaneModule
from foveate.nn.registry import profile_of, registry_of
from foveate.planes import multiplied
from foveate.precision.costs import Bits
from foveate.progress import log

SWITCHES = ("feedback", "grouped", "static-scales", "zero-point", "inputs-16", "bytes", "seconds")
PLAIN = "plain"
_ROUNDS = 4
_DECIDER = "benchmark"


def measure_switches(
    folder: Path, share: float, cases: Sequence[Callable[[Path, float], Case]], bits: Sequence[float], names: list[str]
) -> Measured:
    """The figures of some switches.

    Args:
        folder: of the data.
        share: of the data that is used.
        cases: the models.
        bits: the means.
        names: of `SWITCHES`.

    Raises:
        FoveateError: there is no such switch.
    """
    unknown = [name for name in names if name not in SWITCHES]
    if unknown:
        raise FoveateError(f"switch (={unknown[0]!r}) is not one of {', '.join(SWITCHES)}")
    rounds: list[dict[str, Any]] = []
    for load in cases:
        case = load(folder, share)
        reference = copy.deepcopy(case.model)
        quantize(case.model, case.calibration, objective=case.objective)
        if "seconds" in names:
            measure_timings(case.model, {"input_ids": case.calibration[0]})
        for mean in bits:
            plain_n = None
            for name in (PLAIN, *names):
                started = time.perf_counter()
                row, ours_n = _row(case, reference, name, mean)
                plain_n = ours_n if plain_n is None else plain_n
                row |= {
                    "over_plain": float(ours_n.double().mean() / plain_n.double().mean()),
                    "plain_interval": ratio_interval(ours_n, plain_n),
                    "took": time.perf_counter() - started,
                }
                rounds.append(row)
                log.info("%s", row)
    return Measured(_figures(rounds), rounds)


def _row(case: Case, reference: nn.Module, name: str, bits: float) -> tuple[dict[str, Any], Tensor]:
    """One model at one mean with one switch, and the divergence of each sample."""
    model = case.model
    profile = profile_of(model)
    plan = static_map(profile, Bits(), bits)
    target: dict[str, Any] = {"bits": bits}
    if name == "bytes":
        target = {"bytes": plan.bytes_read}
    elif name == "seconds":
        assert profile.timings is not None
        target = {"seconds": profile.timings.seconds_of(plan)}
    ways = [static(model, plan)]
    static_n = divergences(model, case.evaluation, case.objective, ways, reference=reference)[0]  # scales of each row
    use_static_scales(model, on=name == "static-scales")
    steps = int(name in ("zero-point", "inputs-16"))
    set_raises(model, {site.name: steps for site in profile.input_sites()}, decider=_DECIDER)
    options = AdaptOptions(feedback=name == "feedback", verdict=False)
    try:
        with adapt_to_input(
            model, **target, batches=case.calibration, objective=case.objective, options=options
        ) as adapted:
            # no correction from now on, and a mean that is the target on the held-out text
            adapted.correction = replace(adapted.correction, every=1 << 40, tolerance=0.004)
            cost, factors = adapted.adaptation.estimator.cost, dict(adapted.adaptation.factors)
            if name == "grouped":
                groups = groups_of(model)
                mean = _price_together(adapted, model, groups, case.evaluation, bits)
                with together(model, groups):
                    (ours_n,) = divergences(
                        model, case.evaluation, case.objective, [as_decided(model)], reference=reference
                    )
            else:
                tallies = []
                own = static_map(profile, cost, adapted.correction.target)
                ways = [as_decided(model, lambda: tallies.append(adapted.tally())), static(model, own)]
                with zero_points(model) if name == "zero-point" else nullcontext():
                    adapted.find_price(case.evaluation)
                    adapted.tally()
                    ours_n, static_n = divergences(model, case.evaluation, case.objective, ways, reference=reference)
                mean = sum(t.samples * t.bits for t in tallies) / sum(t.samples for t in tallies)
    finally:
        use_static_scales(model, on=False)
        withdraw(model, _DECIDER)
    row = {
        "model": case.name,
        "switch": name,
        "bits": bits,
        "bits_read": mean,
        "kl": float(ours_n.double().mean()),
        "static_kl": float(static_n.double().mean()),
        "interval": ratio_interval(ours_n, static_n),
        "samples": len(ours_n),
        "factors": factors,
    }
    return row, ours_n


def groups_of(model: nn.Module) -> dict[str, tuple[PlaneModule, ...]]:
    """The fused groups of a model, by the names of their weights."""
    names = {name.removesuffix(":input"): module for name, module in products_of(model).items()}
    return {"+".join(layer.weight.name for layer in layers): layers for _, layers in fused_groups(names)}


@contextmanager
def together(model: nn.Module, groups: Mapping[str, tuple[PlaneModule, ...]]) -> Iterator[None]:
    """Within this context the layers of a fused group read the same map: where the sum of their estimates is above the
    sum of their thresholds, the higher one.
    """
    registry = registry_of(model)
    book, ops = registry.generations.book, torch.ops.foveate

    def decided(x: Tensor, layers: tuple[PlaneModule, ...], pair: tuple[int, int]) -> Tensor:
        """Which rows of x read the higher map, bool [M]."""
        composed = registry.generations.composed
        assert composed is not None
        choice = composed.choices[pair]
        errors, threshold = torch.zeros(()), 0.0
        for layer in layers:
            weight, sample = layer.weight, choice.samples[layer.weight.place]
            tensors = (*weight.value.tensors[:-1], ops.pass_levels(book, weight.place, *weight.value.grid))
            level, limits = ops.pass_input(book, layer.input_place)
            given = (tensors, weight.value.geometry, level, limits, list(pair), sample.strips, sample.row_weights)
            errors = errors + ops.plane_error(x, *given)
            threshold += choice.thresholds[weight.place]
        return errors > threshold

    def hook(layers: tuple[PlaneModule, ...]) -> Callable[..., Tensor]:
        def replaced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            layer, composed = cast(PlaneModule, module), registry.generations.composed
            assert composed is not None
            pair = composed.pairs[0]
            if pair not in composed.choices:  # another map is in force just now
                return y
            x = rows_of_input(layer, args[0] if args else kwargs["input"])
            high = decided(x, layers, pair)
            maps = torch.where(high, pair[1], pair[0]).to(torch.uint8)[:, None].repeat(1, 2)
            tensors, _ = layer.weight.read(x, 1)
            level, limits = ops.pass_input(book, layer.input_place)
            bias = NO_BIAS if layer.bias is None else layer.bias.float()
            return multiplied(x, tensors, layer.weight.value.geometry, [bias], level, maps, input_range=limits)[0]

        return replaced

    hooks = [
        layer.register_forward_hook(hook(layers), with_kwargs=True) for layers in groups.values() for layer in layers
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def zero_points(model: nn.Module) -> Iterator[None]:
    """Within this context each row of an input is rounded to 8 bits between its least and its greatest value."""

    def rounded(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded_rows(args[0].float(), 8, True).to(args[0].dtype), *args[1:])

    hooks = [layer.register_forward_pre_hook(rounded) for layer in products_of(model).values()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _price_together(
    adapted: InputAdaptation,
    model: nn.Module,
    groups: Mapping[str, tuple[PlaneModule, ...]],
    batches: Sequence[Any],
    target: float,
) -> float:
    """Put the price in force at which groups that decide together read `target` bits on batches; the bits they read."""
    ends = adapted.adaptation.around(adapted.index, len(adapted.frontier) - 1)
    low, high = (adapted.frontier[i] for i in ends)
    group_of = {layer.weight.name: name for name, layers in groups.items() for layer in layers}

    def summed(values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            key = group_of.get(name, name)
            found[key] = found[key] + value if key in found else value
        return found

    alone = Shares.between(low, high)
    shares = Shares(low=alone.low, more=summed(alone.more))
    names = [site.name for site in low.weight_sites()]
    mean = math.nan
    for number in range(_ROUNDS + 1):
        parts: dict[str, list[Tensor]] = {}

        def keep(found: Observed, into: dict[str, list[Tensor]] = parts) -> None:
            into.setdefault(found.site, []).append(found.errors)

        with evaluating(model), torch.no_grad(), together(model, groups), observing(model, keep):
            for batch in batches:
                run(model, batch)
        errors = summed({name: torch.cat(found) for name, found in parts.items()})
        unit = replace(adapted.adaptation, multiplier=1.0).choice(adapted.frontier, *ends).thresholds
        units = summed(dict(zip(names, unit, strict=True)))
        price = adapted.adaptation.multiplier
        mean = shares.mean({n: float((found > price * units[n]).float().mean()) for n, found in errors.items()})
        if number == _ROUNDS or abs(mean - target) <= adapted.correction.tolerance * adapted.correction.span:
            break
        adapted.renew(replace(adapted.adaptation, multiplier=solved(shares, errors, units, target)))
    return mean


def _figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for row in rounds:
        name, of = f"{row['model']}_b{row['bits']:g}", row["switch"].replace("-", "_")
        figures[f"{of}_over_static_kl_{name}"] = row["kl"] / row["static_kl"]
        figures[f"{of}_over_plain_kl_{name}"] = row["over_plain"]
        figures[f"{of}_bits_{name}"] = row["bits_read"]
    for switch in dict.fromkeys(row["switch"] for row in rounds):
        logs = [math.log(row["over_plain"]) for row in rounds if row["switch"] == switch]
        figures[f"{switch.replace('-', '_')}_over_plain_kl"] = math.exp(statistics.fmean(logs))
    return figures
