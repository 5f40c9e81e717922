"""The ledger: each site's bytes, its share of the gradient's error at each level, and how audits came out.

Errors add up over sites, because stochastic rounding is unbiased and independent from tensor to tensor. So a site is a
row of numbers: its share of the squared relative error (`metric.py`) at each level. The row is measured in one of two
ways.

**Closed form**, where every function that reads the tensor is linear in it and computes a weight's gradient
(`closed_forms.py`).

**Probes**, for all other sites. The error that rounding makes at the operation is about its variance times the squared
gradient there: `local`. The share of it that reaches the parameters is a factor, `transfer`, that no local statistic
shows. It is measured by a probe: one step's backward is run again with other random bits in the sites of one family
(the same function in all layers), and the squared difference of the gradients is divided by the sum of `local`. A probe
rounds at the levels in use, since probes at 1 bit predicted errors a hundred times too large. `local` includes the mean
weight of the parameters around the site, because the metric weights errors more where gradients are small.

**Audits** compare the gradient that training uses with the exact one of the same step. The logarithms of audited over
predicted error have a mean and a spread. From these follows the predicted error that 99 % of audits keep within the
bound.

    L the levels 2, 4, 8, 16, 32
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foveate.activations.forms.encodings import GROUPED_LEVELS
from foveate.activations.forms.rules import Rule
from foveate.activations.measure.metric import Relative
from foveate.activations.measure.statistics import RunningStatistics
from foveate.activations.policy.choose import LEVELS, SavedSite

#: The 99 % quantile of a normal distribution.
_QUANTILE = 2.326
#: The assumed spread of log(audited / predicted), and how many audits that assumption counts as.
_PRIOR_SPREAD, _PRIOR_COUNT = 0.35, 4.0
_MEMORY = 16  # the latest audits that count
#: By how much the squared error at 2 bits is multiplied where rounding is biased.
_BIAS_COUNTS = 4.0
#: By how much it is multiplied, at all levels, where the effect of an error differs much from batch to batch.
_UNSTEADY_COUNTS = 4.0


def family_of(site: str) -> str:
    """The name of a site with the numbers of its layers left out: `layers.*.mlp:saved.silu.0.0`."""
    module, colon, rest = site.partition(":")
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module) + colon + rest


def recent(rows: Iterable[Tensor]) -> Tensor:
    """A mean in which each row has half of the weight of the next, since training changes."""
    mean_L, *following = rows
    for row_L in following:
        mean_L = (mean_L + row_L) / 2
    return mean_L


def grouped_bytes(values: int, group: int, itemsize: int) -> tuple[int, ...]:
    """Bytes of so many values at each of LEVELS, ranges and padding counted."""
    groups = -(-values // group)
    sizes = [groups * (group * level // 8 + 4) for level in GROUPED_LEVELS]
    return (*(min(size, values * itemsize) for size in sizes), values * itemsize)


@dataclass
class Site:
    """The running record of one site.

    Attributes:
        name: `layers.0.mlp.up_proj:saved.linear.0.0`.
        rule: of the function that saved it first.
        closed: whether every function that reads it has a closed form.
        bytes: in the latest step, at each of LEVELS.
        errors: the last windows' relative squared errors by the closed form, at each of the four grouped levels.
        local: the last windows' variance times squared gradient times the weight around it, at each of the same.
        statistics: of its values.
        step: in which `bytes` were counted.
        recomputed: whether it is computed from other payloads now, and stores no values.
        read_by_second_backward: whether a second backward of a step has read it.
    """

    name: str
    rule: Rule
    closed: bool
    bytes: tuple[int, ...]
    errors: deque[Tensor]
    local: deque[Tensor]
    statistics: RunningStatistics
    step: int = -1
    recomputed: bool = False
    read_by_second_backward: bool = False

    def count(self, bytes: tuple[int, ...], step: int) -> None:
        """Count a tensor's bytes at each of LEVELS. The tensors of one step add up."""
        again = self.bytes and self.step == step
        self.bytes = tuple(a + b for a, b in zip(self.bytes, bytes, strict=True)) if again else bytes
        self.step, self.recomputed = step, False

    @property
    def group(self) -> int:
        """The group that the statistics of its values ask for."""
        return self.statistics.group

    @property
    def layer(self) -> str:
        """The module's dotted name."""
        return self.name.partition(":")[0]


@dataclass
class Family:
    """Sites that are probed together, and how much of a local error reaches the parameters."""

    transfer: deque[float]
    probed_at: int = -1


@dataclass
class AuditHistory:
    """The latest audits, and the predicted error that may be chosen for the bound to hold."""

    log_ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))

    def add(self, predicted: float, audited: float) -> None:
        """One audit: relative errors (not squared)."""
        if predicted > 0 and audited > 0:
            self.log_ratios.append(math.log(audited / predicted))

    @property
    def factor(self) -> float:
        """The predicted error that may be chosen, as a share of the bound. 99 % of audits are then within the bound, if
        their logarithms are normal with the mean and spread estimated from the latest audits.
        """
        count = len(self.log_ratios)
        mean = sum(self.log_ratios) / count if count else 0.0
        squares = sum((v - mean) ** 2 for v in self.log_ratios)
        spread = math.sqrt((squares + _PRIOR_COUNT * _PRIOR_SPREAD**2) / (count + _PRIOR_COUNT))
        known = count + _PRIOR_COUNT
        return math.exp(-mean - _student(known) * spread * math.sqrt(1 + 1 / known))


def _student(degrees: float) -> float:
    """The 99 % quantile of Student's t distribution (Abramowitz and Stegun 26.7.5; 4 % low at 4 degrees of freedom)."""
    z = _QUANTILE
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


class Ledger:
    """All sites and families of a model, and how audits came out.

    Args:
        window: profiled steps that running means cover.
        default: the level of a known function's tensor that was not measured.
        relative_to: what errors are relative to.
    """

    def __init__(self, window: int, default: int, relative_to: Relative = Relative.EACH_PARAMETER) -> None:
        self.window, self.default, self.relative_to = window, default, relative_to
        self.sites: dict[str, Site] = {}
        self.families: dict[str, Family] = {}
        self.audits = AuditHistory()

    def site(self, name: str, rule: Rule) -> Site:
        """The record of a site, new if it was never seen."""
        site = self.sites.get(name)
        if site is None:
            windows: tuple[deque[Tensor], deque[Tensor]] = (deque(maxlen=self.window), deque(maxlen=self.window))
            site = self.sites[name] = Site(name, rule, bool(rule.linear), (), *windows, RunningStatistics(self.window))
        return site

    def forget(self, names: Iterable[str], step: int) -> None:
        """Drop the sites that only a step without a backward has seen, since they would never be measured."""
        for name in names:
            site = self.sites.get(name)
            if site is not None and site.step == step and not (site.errors or site.local):
                del self.sites[name]

    def raise_floor(self, names: Iterable[str], floor: int) -> None:
        """The least level of some sites is at least this one."""
        for site in (self.sites[name] for name in names if name in self.sites):
            if site.rule.floor < floor:
                site.rule = replace(site.rule, floor=floor)

    def new_family(self) -> Family:
        """A family that was never probed."""
        return Family(deque(maxlen=self.window))

    def errors(self, site: Site) -> tuple[float, ...]:
        """The squared relative errors of a site at each of LEVELS; NaN where not measured, infinite below its floor."""
        unknown = (math.nan,) * len(GROUPED_LEVELS)
        found: tuple[float, ...] = unknown
        if site.closed:
            if site.errors:
                found = tuple(recent(site.errors).tolist())
        else:
            transfer = self.families[family_of(site.name)].transfer if family_of(site.name) in self.families else ()
            local_L = recent(site.local) if site.local else None
            if local_L is not None and (transfer or not local_L.any()):  # a gradient of 0 makes no error
                factor = float(recent([torch.tensor(v, dtype=torch.float64) for v in transfer])) if transfer else 0.0
                found = tuple((local_L * factor).tolist())
        if site.read_by_second_backward and not any(found):
            found = unknown  # the second backward has a gradient there that was not measured
        if site.rule.unsteady:
            found = tuple(_UNSTEADY_COUNTS * error for error in found)
        elif site.rule.curved:
            found = (_BIAS_COUNTS * found[0], *found[1:])
        floors = (math.inf if level < site.rule.floor else 0.0 for level in GROUPED_LEVELS)
        return (*(error + floor for error, floor in zip(found, floors, strict=True)), 0.0)

    def saved_sites(self) -> list[SavedSite]:
        """Every site as the policy sees it."""
        return [SavedSite(s.name, s.layer, s.bytes, self.errors(s), self.default_of(s)) for s in self.stored_sites()]

    def stored_sites(self) -> list[Site]:
        """The sites that store something."""
        return [site for site in self.sites.values() if not site.recomputed]

    def default_of(self, site: Site) -> int:
        """The level of a site that was not measured: exact where nothing is known of the function."""
        return max(self.default, site.rule.floor) if site.closed or site.rule.known else LEVELS[-1]

    def next_families(self, count: int) -> list[str]:
        """The families to probe next: those never probed first, then those whose probe is oldest."""
        open_ones = {family_of(s.name) for s in self.stored_sites() if not s.closed}
        order = sorted(open_ones, key=lambda name: (self.family_at(name), name))
        return order[:count]

    def family_at(self, name: str) -> int:
        """The step at which a family was probed last; -1 if never, or if the measurement is invalid."""
        return self.families[name].probed_at if name in self.families else -1

    def invalidate(self) -> None:
        """Declare all probes invalid: every family is probed again, as in the first steps."""
        for family in self.families.values():
            family.probed_at = -1

    def unprobed(self) -> bool:
        """Whether a family that needs a probe has none that is valid."""
        return any(self.family_at(family_of(s.name)) < 0 for s in self.stored_sites() if not s.closed)
