"""How importance is followed: one value for `track_importance`."""

from __future__ import annotations

from dataclasses import dataclass, field

from foveate.errors import BudgetError
from foveate.importance.chains import Thresholds
from foveate.importance.contribution import PATENT_DECAY
from foveate.importance.moves import Caution
from foveate.importance.rolling import Decay

#: A pass of so many tokens and more counts as several.
TOKENS_OF_A_PASS = 16


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """How moves are checked by running a sample of the stream again with all planes.

    Attributes:
        calls: the latest calls that are kept, one sequence of each.
        tokens: the most tokens of a call that is kept.
        every: a check is made at least once in so many tokens of the stream, besides those before each move. A check
            runs the sample three times or more, so this bounds its share of the work.

    Raises:
        BudgetError: a value is not a positive whole number.
    """

    calls: int = 4
    tokens: int = 512
    every: int = 1 << 18

    def __post_init__(self) -> None:
        for name in ("calls", "tokens", "every"):
            _check_count(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """How importance is followed.

        fv.TrackingOptions(decay=Decay(keep=0.5, tokens=32768), caution=Caution(margin=0.05, most_tiles=1000))

    Attributes:
        decay: how fast the past is forgotten.
        warm_up: how many tokens the calibration's own importance, or that of a task, counts as at the start.
        observe_every: one pass in so many is observed. A long pass counts as one for each 16 tokens, since observing it
            costs little beside it.
        most_time: the share of the time of all passes that observed ones may take; they are rarer where they would take
            more. None for no limit.
        decide_every: levels are decided at most once in so many tokens.
        caution: what a move must be worth.
        thresholds: choose levels by thresholds; by the loss that each byte saves if None.
        contribution: the importance is the plain contribution |w x| (patent 10846621), not the loss that a tile costs.
            It needs thresholds.
        shadow: how moves are checked; None trusts the prediction.
        by_hand: decisions are taken where `tracker.step()` is called, and not after a pass. A server calls it between
            its steps, and gives the calls of shadow runs by `tracker.show`.

    Raises:
        BudgetError: a count is not a whole number in its range, or `contribution` is given without thresholds.
    """

    decay: Decay = field(default_factory=Decay)
    warm_up: int = 2048
    observe_every: int = 32
    most_time: float | None = 0.02
    decide_every: int = 4096
    caution: Caution = field(default_factory=Caution)
    thresholds: Thresholds | None = None
    contribution: bool = False
    shadow: Shadow | None = field(default_factory=Shadow)
    by_hand: bool = False

    def __post_init__(self) -> None:
        if type(self.warm_up) is not int or self.warm_up < 0:
            raise BudgetError(f"warm_up (={self.warm_up!r}) is not a whole number from 0 on")
        for name in ("observe_every", "decide_every"):
            _check_count(name, getattr(self, name))
        if self.most_time is not None and not 0 < self.most_time <= 1:
            raise BudgetError(f"most_time (={self.most_time!r}) is not a share above 0, up to 1")
        if self.contribution and self.thresholds is None:
            raise BudgetError("contribution has no losses to compare by: give thresholds too")


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise BudgetError(f"{name} (={value!r}) is not a positive whole number")


#: The patent's own rules: |contribution| from 0 on, 0.9 of the old and 0.1 of the new at every pass, and no caution.
#: Its 16 bits are 8 here, the highest level of planes, and the levels below follow it.
PATENT = TrackingOptions(
    decay=PATENT_DECAY,
    warm_up=0,
    observe_every=1,
    most_time=None,
    caution=Caution(margin=0.0),
    thresholds=Thresholds(levels=(8, 6, 4, 0), at=(2.0, 0.5, 0.05)),
    contribution=True,
    shadow=None,
)
