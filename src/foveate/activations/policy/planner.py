"""Which steps measure what, and what the levels are between them: the store's decisions, apart from its hooks.

The first step finds the sites. The next steps probe the families that need it, a few at a time. Then come audits, until
there are enough of them to judge predictions. Later steps are measured at fixed intervals, and at the powers of two as
well, since training changes fast at first. An audited step is profiled too, so that the prediction belongs to the same
gradient. After an audit above the bound all families are probed again. Under a budget in bytes one early step is
recorded instead of measured. No step is audited then, since an audit holds the exact tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase

from foveate.activations.measure.ledger import Ledger
from foveate.activations.measure.steps import Step
from foveate.activations.memory.timeline import Timeline
from foveate.activations.policy.choose import LEVELS, within_bytes, within_error
from foveate.activations.policy.options import Settings
from foveate.activations.saved_tensors import Payload
from foveate.errors import SiteError

#: Audits before steps are audited only at intervals.
_FIRST_AUDITS = 4
#: Families probed in each of the first steps.
_FIRST_PROBES = 4
#: The most by which the bound is multiplied where audits found predictions too high.
_LARGEST_FACTOR = 4.0
#: The step whose memory is recorded, for a budget in bytes.
RECORDED_STEP = 1


class Planner:
    """The levels of all sites, and how they come about.

    Args:
        settings: what the user wants.

    Attributes:
        ledger: what is known of each site.
        levels: of the sites that were decided on.
        unseen: shell patterns of the settings that have named no site yet.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.ledger = Ledger(settings.options.window, settings.default, settings.relative_to)
        self.levels: dict[str, int] = {}
        self.unseen = set(settings.levels or ()) - {"*"}  # the pattern of one level for all sites

    def level_of(self, name: str) -> int:
        """The level of a site."""
        if self._settings.levels is not None:
            for pattern, level in self._settings.levels.items():
                if fnmatchcase(name, pattern):
                    self.unseen.discard(pattern)
                    return level
            return LEVELS[-1]
        chosen = self.levels.get(name)
        return self.ledger.default_of(self.ledger.sites[name]) if chosen is None else chosen

    def unseen_patterns(self, step: Step) -> SiteError | None:
        """The error, after the first step, that a pattern of the settings names none of its sites; None if all do."""
        if step.number or not self.unseen:
            return None
        patterns, sites = ", ".join(map(repr, sorted(self.unseen))), list(step.sites)
        return SiteError(
            f"pattern {patterns} in levels matches none of {len(sites)} sites, which are like {', '.join(sites[:3])}"
        )

    def step(self, number: int, can_pass: bool) -> Step:
        """What a step measures.

        Args:
            number: of the step, from 0.
            can_pass: whether extra backward passes are possible.
        """
        settings = self._settings
        if settings.levels is not None:
            return Step(number)
        learning = number == 0 or (can_pass and self.ledger.unprobed())
        early = settings.error is not None and number & (number - 1) == 0
        audited_enough = len(self.ledger.audits.log_ratios) >= _FIRST_AUDITS
        audited = (
            not learning and can_pass and (not audited_enough or early or number % settings.options.audit_every == 0)
        )
        if settings.bytes is not None:
            audited = False  # it would hold the exact tensors
            if number == RECORDED_STEP:
                return Step(number)  # whose peak is recorded
        profiled = learning or audited or early or number % settings.options.profile_every == 0
        probed: tuple[str, ...] = ()
        if profiled and number and can_pass:
            probed = tuple(self.ledger.next_families(_FIRST_PROBES if learning or early else settings.options.probes))
        return Step(number, profiled, audited, probed, self.predicted())

    def saw_second_backward(self, payloads: Iterable[Payload]) -> None:
        """A second backward of a step reads payloads. Their effect on its gradient is not measured, so their sites go
        back to the default level, even if the first backward had no gradient there.
        """
        for payload in payloads:
            site = self.ledger.sites.get(payload.site)
            if site is not None and not site.read_by_second_backward:
                site.read_by_second_backward = True
                self.levels.pop(site.name, None)

    def decide(self, timeline: Timeline | None) -> None:
        """Choose levels anew from all that is known.

        Raises:
            BudgetError: no levels keep the peak within the bytes that were asked for.
        """
        settings, sites = self._settings, self.ledger.saved_sites()
        if settings.error is not None:
            allowed = settings.error * min(self.ledger.audits.factor, _LARGEST_FACTOR)
            self.levels = dict(within_error(sites, allowed, settings.options.granularity).levels)
        elif settings.bytes is not None and timeline is not None and not self.ledger.unprobed():
            self.levels = dict(within_bytes(sites, timeline, settings.bytes, settings.options.granularity).levels)

    def predicted(self) -> float:
        """The relative error that the ledger predicts for the levels in use."""
        total: float = 0.0
        for site in self.ledger.stored_sites():
            error = float(self.ledger.errors(site)[LEVELS.index(self.level_of(site.name))])
            total += (
                0.0 if site.read_by_second_backward and math.isnan(error) else error
            )  # audits do not see a second backward
        return math.sqrt(total)
