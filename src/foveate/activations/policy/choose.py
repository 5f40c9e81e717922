"""How many bits each saved tensor gets: pure functions of bytes and errors.

Rounding errors of different tensors are independent and each is zero on average, so their shares of the gradient's
relative squared error (`measure/metric.py`) add up. Choosing levels is then a multiple-choice knapsack. All units start
exact and step down their convex hulls of (bytes, error), the least error per byte saved first (Everett 1963; ActNN,
Chen et al. 2021). These steps form one chain, the same for all budgets. The choice is the best within the budget among
the members of the chain and all choices that differ from a member in one unit. So a larger budget never gives a larger
error, and the result is within one step of one unit of the optimum.

For a peak in bytes the chain lowers only units that are alive at the point with the most bytes.

    U units: sites, layers or the model; L levels; K members of the chain; T points of a timeline
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.activations.memory.timeline import Timeline
from foveate.errors import BudgetError, DataError, SiteError
from foveate.sizes import format_bytes

#: Bits a lossy tensor can be stored with; 32 is the tensor itself.
LEVELS = (2, 4, 8, 16, 32)
_EXACT = len(LEVELS) - 1


class Granularity(enum.Enum):
    """What shares one level."""

    SITE = "site"
    LAYER = "layer"
    MODEL = "model"


@dataclass(frozen=True)
class SavedSite:
    """One place where autograd saves a tensor that may be rounded.

    Attributes:
        name: `layers.0.mlp.up_proj:saved.linear.0`.
        layer: the module's dotted path; sites of one layer share a level where the granularity says so.
        bytes: what the site stores in a step, at each of `LEVELS`.
        errors: what the site adds to the gradient's squared relative error, at each of `LEVELS`: 0 at 32, infinite
            where the level cannot be used, NaN where it was not measured.
        default: the level it keeps while no level below 32 has been measured.

    Raises:
        DataError: from the functions that take sites, for numbers that make no sense.
    """

    name: str
    layer: str
    bytes: tuple[int, ...]
    errors: tuple[float, ...]
    default: int = 32

    @property
    def measured(self) -> bool:
        """Whether there is a level to choose."""
        return any(not math.isnan(error) for error in self.errors[:_EXACT])


@dataclass(frozen=True)
class Choice:
    """What was decided.

    Attributes:
        levels: for each site, one of `LEVELS`; 32 also where fewer bits would save nothing.
        error: the gradient's predicted relative error, the root of the sum over measured sites.
        bytes: of all sites together.
        unmeasured: sites that were left at their default, whose error is therefore not in `error`.
    """

    levels: Mapping[str, int]
    error: float
    bytes: int
    unmeasured: tuple[str, ...] = ()


def _check(site: SavedSite) -> None:
    if len(site.bytes) != len(LEVELS) or len(site.errors) != len(LEVELS):
        raise DataError(
            f"{site.name} has {len(site.bytes)} sizes and {len(site.errors)} errors; the levels are {len(LEVELS)}"
        )
    if site.default not in LEVELS:
        raise DataError(f"the default of {site.name} (={site.default}) is not one of 2, 4, 8, 16, 32")
    for level, size, error in zip(LEVELS, site.bytes, site.errors, strict=True):
        if size < 0:
            raise DataError(f"{site.name} has a size at level {level} (={size}) that is negative")
        if error < 0:
            raise DataError(f"{site.name} has an error at level {level} (={error:g}) that is negative")
    if site.errors[_EXACT] != 0:
        raise DataError(f"{site.name} has an error at level 32 (={site.errors[_EXACT]:g}) that is not 0")


def _stored_level(site: SavedSite, index: int) -> int:
    """The index of the level that a site really gets at a unit's level: exact where rounding saves nothing."""
    return index if site.bytes[index] < site.bytes[_EXACT] else _EXACT


def _errors(site: SavedSite) -> list[float]:
    """Its errors at each level: infinite where it may not go, and nowhere below what a higher level was measured at."""
    least, found = 0.0, [0.0] * len(LEVELS)
    for index in reversed(range(len(LEVELS))):
        error = site.errors[index] if _stored_level(site, index) == index else 0.0
        if math.isfinite(error):
            least = max(least, error)
        found[index] = max(least, error) if not math.isnan(error) else math.inf
    return found


@dataclass(frozen=True, eq=False)
class _Problem:
    """The decision as numbers.

    Attributes:
        units: the sites of each unit.
        error_UL, bytes_UL: float64; infinite errors where a level may not be used.
        fixed: sites that keep their default.
    """

    units: tuple[tuple[SavedSite, ...], ...]
    error_UL: Tensor
    bytes_UL: Tensor
    fixed: tuple[SavedSite, ...]

    def choice(self, levels: Sequence[int]) -> Choice:
        """Level indices of the units, as a `Choice`."""
        chosen = {s: _stored_level(s, i) for unit, i in zip(self.units, levels, strict=True) for s in unit}
        errors = [_errors(site)[index] for site, index in chosen.items()]
        chosen.update((site, LEVELS.index(site.default)) for site in self.fixed)
        return Choice(
            {site.name: LEVELS[index] for site, index in chosen.items()},
            math.sqrt(math.fsum(errors)),
            sum(site.bytes[index] for site, index in chosen.items()),
            tuple(site.name for site in self.fixed),
        )

    def steps(self) -> list[tuple[int, int]]:
        """(unit, level index) of all hull steps downwards, in the order in which they are worth taking."""
        found = []
        for unit, (errors, sizes) in enumerate(zip(self.error_UL.tolist(), self.bytes_UL.tolist(), strict=True)):
            at = _EXACT
            while True:
                ahead = [i for i in range(at) if sizes[i] < sizes[at] and math.isfinite(errors[i])]
                if not ahead:
                    break
                # of equal rates the farthest, so that a unit's rates rise strictly
                rate, _, low = min(((errors[i] - errors[at]) / (sizes[at] - sizes[i]), sizes[i], i) for i in ahead)
                found.append((rate, unit, -low))
                at = low
        return [(unit, -low) for _, unit, low in sorted(found)]


def _build(sites: Sequence[SavedSite], granularity: Granularity) -> _Problem:
    for site in sites:
        _check(site)
    if len({site.name for site in sites}) < len(sites):
        names = [site.name for site in sites]
        raise SiteError(f"{next(n for n in names if names.count(n) > 1)} is given twice")
    groups: dict[str, list[SavedSite]] = {}
    for site in sites:
        if site.measured:
            key = {Granularity.SITE: site.name, Granularity.LAYER: site.layer, Granularity.MODEL: ""}[granularity]
            groups.setdefault(key, []).append(site)
    units = tuple(tuple(group) for group in groups.values())
    shape = (len(units), len(LEVELS))
    levels = range(len(LEVELS))
    errors = [[math.fsum(column) for column in zip(*(_errors(s) for s in unit), strict=True)] for unit in units]
    sizes = [[sum(s.bytes[_stored_level(s, i)] for s in unit) for i in levels] for unit in units]
    return _Problem(
        units,
        torch.tensor(errors, dtype=torch.float64).reshape(shape),
        torch.tensor(sizes, dtype=torch.float64).reshape(shape),
        tuple(site for site in sites if not site.measured),
    )


def within_error(sites: Sequence[SavedSite], error: float, granularity: Granularity = Granularity.SITE) -> Choice:
    """The fewest bytes whose predicted relative error of the gradient is at most `error`.

    At most one hull step of one unit above the fewest possible; never more for a larger `error`.

    Args:
        sites: all lossy sites.
        error: the bound on the relative error, 0 or more. Unmeasured sites are not part of it.
        granularity: what shares a level.

    Raises:
        BudgetError: `error` is negative or not finite.
        DataError, SiteError: a site's numbers make no sense, or two have one name.
    """
    if not (math.isfinite(error) and error >= 0):
        raise BudgetError(f"error (={error}) must be a number of at least 0")
    problem = _build(sites, granularity)
    if not problem.units:
        return problem.choice([])
    limit = error**2 * (1 + 1e-12)
    steps = problem.steps()
    # the chain: member k has taken k steps
    level_KU = torch.full((len(steps) + 1, len(problem.units)), _EXACT)
    for k, (unit, level) in enumerate(steps):
        level_KU[k + 1 :, unit] = level
    error_KU = problem.error_UL.gather(1, level_KU.t()).t()
    bytes_KU = problem.bytes_UL.gather(1, level_KU.t()).t()
    error_K, bytes_K = error_KU.sum(1), bytes_KU.sum(1)
    # what one change can at most give; beyond these members nothing can be better, the bounds being monotone in k
    least_error_K = error_K - error_KU.amax(1)
    least_bytes_K = bytes_K - (bytes_KU - problem.bytes_UL.amin(1)).amax(1)
    last = int((error_K <= limit).nonzero().max())
    best, key = level_KU[last].tolist(), (float(bytes_K[last]), float(error_K[last]))
    for k in (*range(last, -1, -1), *range(last + 1, len(steps) + 1)):
        if float(least_bytes_K[k]) > key[0]:
            continue
        if float(least_error_K[k]) > limit:
            break
        error_UL = float(error_K[k]) + problem.error_UL - error_KU[k][:, None]
        bytes_UL = float(bytes_K[k]) + problem.bytes_UL - bytes_KU[k][:, None]
        bytes_UL[error_UL > limit] = math.inf
        fewest = float(bytes_UL.min())
        error_UL[bytes_UL > fewest] = math.inf
        if (fewest, float(error_UL.min())) < key:
            unit, level = divmod(int(error_UL.argmin()), len(LEVELS))
            best, key = level_KU[k].tolist(), (fewest, float(error_UL.min()))
            best[unit] = level
    return problem.choice(best)


def _usage(problem: _Problem, timeline: Timeline) -> tuple[Tensor, Tensor]:
    """Bytes at each point that no choice changes, float64 [T], and those of each unit's levels, float64 [T, U, L]."""
    _, share_TS, alone_TS = timeline.table
    column = {name: i for i, name in enumerate(timeline.original)}
    chosen = {s.name: 0 for unit in problem.units for s in unit}
    fixed = {s.name: s.bytes[LEVELS.index(s.default)] for s in problem.fixed}
    if not timeline.other:
        return torch.zeros(1, dtype=torch.float64), torch.zeros(1, len(problem.units), len(LEVELS), dtype=torch.float64)
    other_T = timeline.usage({**fixed, **chosen})
    use_TUL = torch.zeros(len(other_T), len(problem.units), len(LEVELS), dtype=torch.float64)
    for u, unit in enumerate(problem.units):
        for site in unit:
            if site.name in column:
                for i in range(len(LEVELS)):
                    index = _stored_level(site, i)
                    shares_TS = alone_TS if index == _EXACT else share_TS
                    use_TUL[:, u, i] += shares_TS[:, column[site.name]] * site.bytes[index]
    return _undominated(other_T, use_TUL)


def _undominated(other_T: Tensor, use_TUL: Tensor) -> tuple[Tensor, Tensor]:
    """Without the points at which, whatever is chosen, no more is in use than at a neighbour."""
    rows = torch.cat([other_T[:, None], use_TUL.flatten(1)], 1)
    while len(rows) > 1:
        below_next = (rows[:-1] <= rows[1:]).all(1)
        below_last = (rows[1:] <= rows[:-1]).all(1) & ~below_next
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[:-1] &= ~below_next
        keep[1:] &= ~below_last
        if bool(keep.all()):
            break
        rows = rows[keep]
    return rows[:, 0], rows[:, 1:].reshape(len(rows), *use_TUL.shape[1:])


def _descend(problem: _Problem, other_T: Tensor, use_TUL: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """The chain for a peak: (level indices, usage at each point), from all exact down, lowering what is alive at the
    fullest point until nothing there can be lowered.
    """
    steps = problem.steps()
    start = {unit: at for at, (unit, _) in reversed(list(enumerate(steps)))}
    levels = [_EXACT] * len(problem.units)
    taken = [False] * len(steps)
    first = [0] * len(other_T)  # for each point, where in `steps` there may be one that helps it
    use = use_TUL.tolist()
    usage_T = other_T + use_TUL[:, :, _EXACT].sum(1)
    while True:
        yield levels, usage_T
        point = int(usage_T.argmax())
        at = first[point]
        while at < len(steps):
            unit, level = steps[at]
            if not taken[at] and use[point][unit][level] < use[point][unit][levels[unit]]:
                break
            at += 1
        first[point] = at
        if at == len(steps):
            return
        # a unit's steps are in order, so those that this one goes past helped nothing here: they are taken with it
        for i in range(start[unit], at + 1):
            taken[i] = taken[i] or steps[i][0] == unit
        # once it is rounded, rounding it more may help where the original costs nothing
        first = [min(i, start[unit]) for i in first]
        usage_T = usage_T + use_TUL[:, unit, level] - use_TUL[:, unit, levels[unit]]
        levels = [*levels[:unit], level, *levels[unit + 1 :]]


def within_bytes(
    sites: Sequence[SavedSite], timeline: Timeline, bytes: int, granularity: Granularity = Granularity.SITE
) -> Choice:
    """The least predicted error of the gradient whose predicted peak is at most `bytes`.

    Never more for a larger `bytes`.

    Args:
        sites: all lossy sites. One that the timeline does not know is never in the way.
        timeline: what a step keeps in memory.
        bytes: the bound on the peak, everything the timeline counts included.
        granularity: what shares a level.

    Raises:
        BudgetError: no choice fits; the message says the least peak.
        DataError, SiteError: a site's numbers make no sense, or two have one name.
    """
    problem = _build(sites, granularity)
    other_T, use_TUL = _usage(problem, timeline)
    error_UL, bytes_UL = problem.error_UL, problem.bytes_UL
    units = torch.arange(len(problem.units))
    best: list[int] | None = None
    key = (math.inf, math.inf)
    least = math.inf
    for levels, usage_T in _descend(problem, other_T, use_TUL):
        at_U = torch.tensor(levels, dtype=torch.long)
        error_U, bytes_U = error_UL[units, at_U], bytes_UL[units, at_U]
        error, size = float(error_U.sum()), float(bytes_U.sum())
        peak = float(usage_T.max())
        least = min(least, peak)
        # the sum without its greatest term only rises along the chain
        if error - float(error_U.max() if len(units) else 0.0) > key[0]:
            break
        if peak <= bytes and (error, size) < key:
            best, key = levels, (error, size)
        if not len(units) or peak - bytes > float(use_TUL.amax((0, 2)).max()):
            continue
        new_error_UL = error + error_UL - error_U[:, None]
        new_bytes_UL = size + bytes_UL - bytes_U[:, None]
        better = (new_error_UL < key[0]).nonzero()
        change_TC = use_TUL[:, better[:, 0], better[:, 1]] - use_TUL[:, better[:, 0], at_U[better[:, 0]]]
        fits = (usage_T[:, None] + change_TC <= bytes).all(0)
        if bool(fits.any()):
            candidates_C2 = better[fits]
            errors_C = new_error_UL[candidates_C2[:, 0], candidates_C2[:, 1]]
            sizes_C = new_bytes_UL[candidates_C2[:, 0], candidates_C2[:, 1]]
            sizes_C[errors_C > errors_C.min()] = math.inf
            unit, level = candidates_C2[int(sizes_C.argmin())].tolist()
            best, key = [*levels[:unit], level, *levels[unit + 1 :]], (float(errors_C.min()), float(sizes_C.min()))
    if best is None:
        note = f"; sites not measured: {len(problem.fixed)}" if problem.fixed else ""
        raise BudgetError(
            f"no levels keep the peak within bytes (={bytes}, {format_bytes(bytes)}): the least possible is "
            f"{math.ceil(least)} ({format_bytes(least)}){note}"
        )
    return problem.choice(best)
