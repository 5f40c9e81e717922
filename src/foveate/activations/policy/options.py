"""What `compress_activations` was told: the target, and the options beside it. Frozen values that check themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.activations.measure.metric import Relative
from foveate.activations.policy.choose import LEVELS, Granularity
from foveate.errors import BudgetError, LevelError

#: Bounds below it need more than 8 bits before anything is measured.
_SMALL_ERROR = 0.01


def _check_level(level: Any) -> None:
    if type(level) is not int or level not in LEVELS:
        raise LevelError(f"level (={level!r}) is not one of {', '.join(map(str, LEVELS))}")


def _check_count(name: str, count: Any, least: int) -> None:
    if type(count) is not int or count < least:
        raise BudgetError(f"{name} (={count!r}) must be a whole number of at least {least}")


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """How activations are compressed, beside the target: what need not be set from day to day.

        options = fv.ActivationOptions(granularity=fv.Granularity.LAYER, audit_every=200)
        store = fv.compress_activations(model, error=0.1, options=options)

    Attributes:
        granularity: what shares one level: each site, each layer, or the model.
        default: the level of a tensor before it has been measured; if not given 8, or 16 where the error is below 0.01,
            or 4 under a budget in bytes. Of functions nothing is known about it is 32.
        profile_every: steps between two profiled ones (the first few are all profiled).
        audit_every: steps between two audits, which hold the exact tensors of one step and run backward twice.
        window: profiled steps that running statistics cover.
        probes: families of sites probed in a profiled step, one more backward each.
        group: values that share a minimum and a step, 32 bits together; chosen for each site from the statistics of
            its values if not given.
        smallest: tensors of fewer values are kept exactly.
        recompute: whether cheap functions of stored tensors (activations, products, norms) and attention are run again
            instead of being stored too.
        seed: of the private generator of stochastic rounding; torch's is never touched.

    Raises:
        BudgetError: an option that makes no sense.
        LevelError: `default` is a level that saved tensors cannot have.
    """

    granularity: Granularity = Granularity.SITE
    default: int | None = None
    profile_every: int = 50
    audit_every: int = 50
    window: int = 8
    probes: int = 1
    group: int | None = None
    smallest: int = 1024
    recompute: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.granularity, Granularity):
            raise BudgetError(
                f"granularity (={self.granularity!r}) is not a Granularity, such as foveate.Granularity.LAYER"
            )
        if self.default is not None:
            _check_level(self.default)
        for name in ("profile_every", "audit_every", "window", "probes"):
            _check_count(name, getattr(self, name), 1)
        if self.group is not None and (type(self.group) is not int or self.group % 32 or not 32 <= self.group <= 1024):
            raise BudgetError(f"group (={self.group!r}) must be a multiple of 32 from 32 to 1024")
        _check_count("smallest", self.smallest, 0)
        if type(self.recompute) is not bool:
            raise BudgetError(f"recompute (={self.recompute!r}) is not True or False")
        if type(self.seed) is not int:
            raise BudgetError(f"seed (={self.seed!r}) is not a whole number")


#: What holds where nothing is said.
DEFAULT_OPTIONS = ActivationOptions()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a store decides: exactly one target, of `error`, `bytes` and `levels`, and the options beside it.

    Attributes:
        error: the gradient's relative error that audits should stay under; None where something else is given.
        bytes: the peak of a step's memory, instead of an error.
        levels: shell pattern of site names -> level, instead of measuring.
        relative_to: what errors are relative to.
        options: all else.

    Raises:
        BudgetError, LevelError: as for `foveate.compress_activations`.
    """

    error: float | None = None
    bytes: int | None = None
    levels: Mapping[str, int] | None = None
    relative_to: Relative = Relative.EACH_PARAMETER
    options: ActivationOptions = DEFAULT_OPTIONS

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.error, self.bytes, self.levels)) != 1:
            raise BudgetError("give one of error=, bytes= and levels=")
        if self.error is not None and not _is_positive(self.error):
            raise BudgetError(f"error (={self.error!r}) must be a number above 0")
        if self.bytes is not None:
            _check_count("bytes", self.bytes, 1)
        if self.levels is not None:
            if not isinstance(self.levels, Mapping):
                raise LevelError(
                    f"levels (={self.levels!r}) is no level, and no mapping of patterns of sites to levels"
                )
            for level in self.levels.values():
                _check_level(level)
            object.__setattr__(self, "levels", dict(self.levels))
        if not isinstance(self.relative_to, Relative):
            raise BudgetError(
                f"relative_to (={self.relative_to!r}) is not a Relative, such as foveate.Relative.WHOLE_GRADIENT"
            )
        if not isinstance(self.options, ActivationOptions):
            raise BudgetError(
                f"options (={self.options!r}) are not ActivationOptions, such as ActivationOptions(audit_every=200)"
            )

    @property
    def default(self) -> int:
        """The level of a tensor before it has been measured."""
        if self.options.default is not None:
            return self.options.default
        if self.bytes is not None:
            return 4
        return 16 if self.error is not None and self.error < _SMALL_ERROR else 8


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
