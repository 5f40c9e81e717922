"""`foveate allocate`: choose another default map for a folder, from the profile that quantizing it measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import typer
from rich.table import Table

import foveate as fv
from foveate.cli import frontier
from foveate.cli.shared import options
from foveate.cli.shared.console import emit, plain_table, show
from foveate.cli.shared.data import Request
from foveate.cli.shared.tables import legend, map_figures, sizes_table
from foveate.errors import BudgetError
from foveate.formats.levels import check_input_level
from foveate.precision.maps import Levels, PrecisionMap, Site, input_level_for, meant_sites
from foveate.precision.profiles import Profile
from foveate.report.page import figure, loss_name
from foveate.sizes import format_bytes


def allocate(
    out: options.Folder,
    bits: options.Bits = None,
    bytes_: options.Bytes = None,
    loss: options.Loss = None,
    latency: options.Latency = None,
    levels: options.Levels = options.ALL_LEVELS,
    per_weight: options.PerWeight = False,
    tie: options.Tie = None,
    input_bits: Annotated[
        float | None,
        typer.Option(
            help="Also choose levels of inputs with this average of bits; less than 8 saves no time on a CPU."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATTERN=LEVEL", help="Fix the level of some weights or inputs; repeatable."),
    ] = None,
    maps: Annotated[
        int | None,
        typer.Option(
            "--frontier",
            metavar="MAPS",
            help="Store a chain of so many maps from the best to the cheapest; with --data or --tokens, measure it.",
        ),
    ] = None,
    point: Annotated[
        str | None,
        typer.Option(help="Take the stored frontier's map of this name, or of at most so many bits, bytes or time."),
    ] = None,
    data: options.Data = None,
    tokens: options.Tokens = None,
    samples: options.Samples = 32,
    length: options.Length = None,
    batch: options.Batch = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the map without storing it.")] = False,
    json_output: options.Json = False,
) -> None:
    """Choose the precision of every tile under a budget, and make that the folder's default map.

    With --set and no budget, the folder's default map is changed only where --set says. With --frontier and nothing
    else, the default map stays.
    """
    budget = options.budget_of(bits, bytes_, loss, latency)
    fixed = options.settings_of(settings)
    head = fv.read_head(out)
    if point is not None and budget is not None:
        raise BudgetError("give --point or a budget, not both")
    if point is not None and maps is None:
        head = replace(head, plan=_at_point(fv.load_frontier(out), point))
    if maps is not None:
        if dry_run:
            raise BudgetError("--frontier is stored: it cannot be a dry run")
        request = None if data is None and tokens is None else Request(data, tokens, samples, length, batch)
        chain = frontier.make(out, maps, options.constraints_of(levels, per_weight, tie, input_bits), request)
        if point is not None:
            head = replace(head, plan=_at_point(chain, point))
        elif budget is None and not fixed:
            if json_output:
                print(emit({"folder": str(out), "frontier": frontier.figures(chain)}))
            else:
                show(frontier.table(chain), f"stored as the frontier of {out}")
            return
    if budget is None and not fixed and point is None:
        raise BudgetError(
            "there is no budget: give --bits, --bytes, --loss, --latency or --point, or levels with --set PATTERN=LEVEL"
        )
    if budget is None and input_bits is not None and maps is None:
        raise BudgetError("--input-bits needs a budget: give --bits, --bytes, --loss or --latency")
    profile = fv.load_profile(out)
    weights, inputs = _settings(head.sites, fixed)
    if budget is None:
        plan = replace(head.plan, levels={**head.plan.levels, **_with_inputs(head.sites, weights)})
    else:
        constraints = options.constraints_of(levels, per_weight, tie, input_bits)
        plan = within(profile, budget, weights, constraints)
        if not weights:
            options.warn_if_budget_is_unused(budget, plan, constraints.levels)
    plan = replace(plan, levels={**plan.levels, **inputs})
    plan = replace(plan, predicted_loss=profile.predict(plan))
    uniform_plan = fv.uniform_of_bytes(plan)
    uniform_plan = replace(uniform_plan, predicted_loss=profile.predict(uniform_plan))
    if not dry_run:
        fv.save_map(out, plan)
    if json_output:
        print(
            emit(
                {
                    "folder": str(out),
                    "stored": not dry_run,
                    "map": map_figures(plan),
                    "uniform": map_figures(uniform_plan),
                }
            )
        )
        return
    show(legend(plan), _comparison_table(plan, uniform_plan, profile), sizes_table(plan))
    if budget is not None and budget.loss is not None:
        show(
            f"predicted to lose {figure(plan.predicted_loss)}, at most {figure(budget.loss)}; foveate eval measures "
            "the true loss, and foveate quantize --loss keeps it within the limit"
        )
    show("nothing stored: a dry run" if dry_run else f"stored as the default map of {out}")


def _at_point(chain: fv.Frontier, point: str) -> PrecisionMap:
    """The map of a frontier that a text names."""
    return chain[chain.find(point)]


def _settings(sites: Sequence[Site], fixed: Sequence[tuple[str, str]]) -> tuple[dict[str, Levels], dict[str, Levels]]:
    """(levels of weights, levels of inputs). A pattern means weights, or inputs if it matches no weight."""
    weights: dict[str, Levels] = {}
    inputs: dict[str, Levels] = {}
    for pattern, text in fixed:
        named = [s for s in sites if s.matches(options.weight_pattern(pattern))] or meant_sites(sites, pattern)
        if named[0].kind == "weight":
            weights.update({site.name: options.level_of(text) for site in named})
        else:
            level = check_input_level(int(text)) if text.isdigit() else options.level_of(text)
            inputs.update({site.name: level for site in named})
    return weights, inputs


def _with_inputs(sites: Sequence[Site], weights: Mapping[str, Levels]) -> dict[str, Levels]:
    """The given levels of weights, and the levels of inputs that follow from them."""
    levels = dict(weights)
    for site in sites:
        level = weights.get(site.name)
        if isinstance(level, int) and site.kind == "weight":
            names = {f"{name.rpartition(':')[0]}:input" for name in (site.name, *site.aliases)}
            levels.update({s.name: input_level_for(level) for s in sites if s.name in names})
    return levels


def _checked_budget(budget: fv.Budget, profile: Profile, plan: PrecisionMap) -> PrecisionMap:
    """The map itself. Raises `BudgetError` if it exceeds the budget."""
    for name, limit, taken in (
        ("bytes", budget.bytes, plan.bytes_resident),
        ("bits", budget.bits, plan.bits),
        ("loss", budget.loss, profile.predict(plan)),
        ("seconds a token", budget.latency, _seconds(budget, profile, plan)),
    ):
        if limit is not None and taken > float(limit):
            raise fv.BudgetError(f"--set fixes every weight, and that takes {taken:g} {name} of the {limit} allowed")
    return plan


def _seconds(budget: fv.Budget, profile: Profile, plan: PrecisionMap) -> float:
    """The time of a map by the profile's timings; NaN where the budget is of something else."""
    return math.nan if budget.latency is None or profile.timings is None else profile.timings.seconds_of(plan)


def within(
    profile: Profile, budget: fv.Budget, weights: Mapping[str, Levels], constraints: fv.Constraints
) -> PrecisionMap:
    """The best map with fixed levels of some weights: the other weights share what is left of the budget.

    Args:
        profile: what was measured.
        budget: for the whole map.
        weights: the fixed levels, by site.
        constraints: what the other weights must keep to.

    Raises:
        BudgetError: the fixed weights alone exceed the budget, or the rest does not fit beside them.
    """
    if not weights:
        return fv.allocate(profile, budget, constraints)
    levels = _with_inputs(profile.sites, weights)
    fixed_sites = [s for s in profile.sites if s.name in levels]
    rest = tuple(s for s in profile.sites if s.name not in levels)
    fixed_map = PrecisionMap(tuple(fixed_sites), levels)
    if not any(s.kind == "weight" for s in rest):
        return _checked_budget(budget, profile, replace(profile.uniform(0), levels=levels))
    losses = {s.name: profile.losses[s.name] for s in rest if s.name in profile.losses}
    part = replace(profile, sites=rest, losses=losses, other_bytes=profile.other_bytes + fixed_map.bytes_resident)
    if budget.bits is not None:
        total = sum(s.weights for s in profile.weight_sites())
        left = sum(s.weights for s in part.weight_sites())
        budget = _remaining_budget(fv.Budget, bits=(budget.bits * total - 8 * fixed_map.bytes_stored) / left)
    elif budget.loss is not None:
        budget = _remaining_budget(
            fv.Budget, loss=budget.loss - replace(profile, sites=tuple(fixed_sites)).predict(fixed_map)
        )
    elif budget.latency is not None and profile.timings is not None:
        spent = profile.timings.seconds_of(fixed_map) - profile.timings.rest
        budget = _remaining_budget(fv.Budget, latency=float(budget.latency) - spent)
    try:
        plan = fv.allocate(part, budget, constraints)
    except BudgetError as error:
        raise BudgetError(f"for the weights that --set leaves: {error}") from error
    return replace(profile.uniform(0), levels={**plan.levels, **levels}, predicted_loss=math.nan)


def _remaining_budget(make: Callable[..., fv.Budget], **room: float) -> fv.Budget:
    if min(room.values()) <= 0:
        raise BudgetError("the levels given with --set leave nothing of the budget for the other weights")
    return make(**room)


def _comparison_table(plan: PrecisionMap, uniform_plan: PrecisionMap, profile: Profile) -> Table:
    table = plain_table(f"predicted: {loss_name(profile.objective)}", "loss", "bits", "stored", "in memory", "read")
    for label, one in (("this map", plan), ("uniform at equal bytes", uniform_plan)):
        sizes = (format_bytes(n) for n in (one.bytes_stored, one.bytes_resident, one.bytes_read))
        table.add_row(label, figure(one.predicted_loss), f"{one.bits:.2f}", *sizes)
    return table
