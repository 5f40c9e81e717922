"""audit: sensitivity measured by perturbation, as a check of the losses in a profile.

A profile computes its losses from gradients (`foveate.sensitivity.fisher`). Perturbation needs no such model: it lowers
one site to one level, leaves every other site at its highest stored level, and measures how far the output moves. Each
site and level takes one pass over the data. Perturbation is therefore for some sites, or for small models.
`Audit.corrected` returns a profile in which the measured loss of a site replaces the computed one; the shares of the
site's tiles stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from foveate.collect.objectives import Objective, named
from foveate.errors import FoveateError, LevelError
from foveate.evaluate.float32_floor import ratio, ratio_text
from foveate.evaluate.verify import measure
from foveate.formats.levels import INPUT_LEVELS, WEIGHT_LEVELS, check_weight_level
from foveate.nn.levels import highest_map
from foveate.nn.registry import profile_of, registry_of
from foveate.precision.maps import PrecisionMap, Site, find_sites
from foveate.precision.profiles import Profile


@dataclass(frozen=True)
class Perturbation:
    """The effect of one site at one level, with every other site at its highest level.

    Attributes:
        site, level: the site that was lowered, and the level.
        predicted: the divergence that the profile predicts for this change.
        measured: the divergence from the model with every site at its highest level.
        standard_error: the standard error of `measured`, with samples taken as independent.
    """

    site: str
    level: int
    predicted: float
    measured: float
    standard_error: float

    @property
    def ratio(self) -> float:
        """The measured over the predicted divergence; NaN without a prediction, or if both are at the floor."""
        return ratio(self.measured, self.predicted)


@dataclass(frozen=True)
class Audit:
    """The result of `audit`.

    Attributes:
        entries: one entry for each site and level, in the order of the model.
        samples: the number of samples that were measured.
        unit: the unit of the divergences.
    """

    entries: tuple[Perturbation, ...]
    samples: int
    unit: str

    @property
    def ratio(self) -> float:
        """The geometric mean of the entries' ratios; NaN if no entry has a ratio."""
        logs = [math.log(e.ratio) for e in self.entries if e.ratio > 0]
        return math.exp(sum(logs) / len(logs)) if logs else math.nan

    @property
    def summary(self) -> str:
        """The mean ratio as text."""
        said = f"{self.ratio:.2f}" if math.isfinite(self.ratio) else "not known"
        return f"measured / predicted, geometric mean: {said}"

    def __str__(self) -> str:
        width = max([len("site"), *(len(e.site) for e in self.entries)])
        lines = [f"{'site':{width}}  level  {'predicted':>10}  {'measured':>10}  {'+-':>8}  measured / predicted"]
        lines += [
            f"{e.site:{width}}  {e.level:>5}  {e.predicted:>10.3g}  {e.measured:>10.3g}  {e.standard_error:>8.2g}  "
            f"{ratio_text(e.measured, e.predicted)}"
            for e in self.entries
        ]
        lines.append(f"{self.unit}, {self.samples} samples; {self.summary}")
        return "\n".join(lines)

    def corrected(self, profile: Profile) -> Profile:
        """A profile in which the audited sites lose what was measured; the shares of their tiles stay the same.

        Levels that were not measured are scaled like the nearest measured level of the same site. Where two levels are
        equally near, the factor is their geometric mean. Sites that were not audited stay as they are.

        Raises:
            SiteError: the profile is of another model.
        """
        by_site: dict[str, dict[int, float]] = {}
        for e in self.entries:
            by_site.setdefault(e.site, {})[e.level] = e.measured
        losses = dict(profile.losses)
        for name, measured in by_site.items():
            (site,) = find_sites([s for s in profile.sites if s.name == name] or profile.sites, name)
            losses[name] = _scaled(losses[name], _levels_of(site), measured)
        note = f"the losses of {len(by_site)} sites are those measured by perturbation, on {self.samples} samples"
        return replace(profile, losses=losses, notes=(*profile.notes, note))


def _levels_of(site: Site) -> tuple[int, ...]:
    return WEIGHT_LEVELS if site.kind == "weight" else INPUT_LEVELS


def _scaled(table: Tensor, levels: Sequence[int], measured: Mapping[int, float]) -> Tensor:
    """Losses [T, levels], scaled so that the columns of measured levels have the measured sums."""
    sums = dict(zip(levels, table.double().sum(0).tolist(), strict=True))
    made = table.clone()
    logs = {level: math.log(value / sums[level]) for level, value in measured.items() if value > 0 < sums[level]}
    for i, level in enumerate(levels):
        if level in measured:
            made[:, i] = (
                table[:, i] * (measured[level] / sums[level]) if sums[level] > 0 else measured[level] / len(table)
            )
        elif logs:
            nearest = min(abs(levels.index(known) - i) for known in logs)
            near = [value for known, value in logs.items() if abs(levels.index(known) - i) == nearest]
            made[:, i] = table[:, i] * math.exp(sum(near) / len(near))
    return made


def audit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sites: str | Sequence[str] = "*:weight",
    levels: Sequence[int] = (3,),
    objective: Objective | None = None,
    progress: bool = True,
) -> Audit:
    """Measure what single sites lose at single levels, and compare the losses with the profile's predictions.

    Every batch runs once for each site and level, and once for the reference: the model itself with every site at the
    highest level that is loaded. The map in force is applied again at the end. The model should run in float32:
    outputs in bfloat16 are rounded so coarsely that any change measures as about 1e-4 nats.

    Args:
        model: a quantized model with its profile.
        batches: data, as for `foveate.quantize`, preferably other data than those of the calibration.
        sites: shell patterns of sites, weights or inputs.
        levels: levels to lower each site to; levels that a site cannot have are left out.
        objective: as for `foveate.quantize`; by default that of the profile.
        progress: whether to show a progress bar.

    Raises:
        SiteError: a pattern names no site.
        LevelError: no site named has any of the levels below its highest.
        DataError: there are no batches, or outputs of the reference are not finite.
        FoveateError: the model was loaded without its profile.
    """
    profile, top = profile_of(model), highest_map(model)
    for level in levels:
        if level not in INPUT_LEVELS:
            check_weight_level(level)
    patterns = (sites,) if isinstance(sites, str) else tuple(sites)
    if not patterns:
        raise FoveateError("sites is empty: name at least one pattern")
    wanted = {s.name for pattern in patterns for s in find_sites(profile.sites, pattern)}
    plans: dict[tuple[str, int], PrecisionMap] = {}
    for site in profile.sites:
        if site.name in wanted:
            for level in dict.fromkeys(levels):
                if level in _levels_of(site) and level < top.mean_level(site):
                    plans[site.name, level] = replace(top, levels={**top.levels, site.name: level})
    if not plans:
        raise LevelError(
            f"none of the {len(wanted)} sites named can be lowered to {', '.join(map(str, levels)) or 'no level'}"
        )
    for plan in plans.values():
        registry_of(model).check(plan)
    objective = objective or named(profile.objective)
    outcomes = measure(model, list(plans.values()), batches, objective=objective, progress=progress)
    # one site is lowered at a time, so the correction for many sites lowered together does not apply
    uncorrected = replace(profile, measured_over_summed=(1.0,) * len(profile.measured_over_summed))
    base = uncorrected.predict(top)
    entries = tuple(
        Perturbation(name, level, uncorrected.predict(plan) - base, got.divergence, got.standard_error)
        for ((name, level), plan), got in zip(plans.items(), outcomes, strict=False)
    )
    return Audit(entries, outcomes[-1].samples, "divergence" if objective is None else objective.unit)
