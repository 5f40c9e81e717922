"""How a store decides: what `compress_activations` was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foveate.activations.metric import Relative
from foveate.activations.policy import Granularity


@dataclass(frozen=True)
class Settings:
    """How a store decides.

    Attributes:
        error: the gradient's relative error that audits should stay under; None where something else is given.
        bytes: the peak of a step's memory, instead of an error.
        levels: shell pattern of site names -> level, instead of measuring.
        relative_to: what errors are relative to.
        granularity: what shares one level.
        default: the level of a tensor that has not been measured yet.
        profile_every, audit_every: steps between two profiles and two audits.
        window: profiled steps that the running statistics cover.
        probes: families probed in a profiled step.
        group: values that share a least value and a step; None lets each site's statistics choose.
        smallest: tensors of fewer values stay exact.
        recompute: whether cheap functions of stored tensors are computed again instead of being stored.
        seed: of the private generator.
    """

    error: float | None
    bytes: int | None
    levels: Mapping[str, int] | None
    relative_to: Relative
    granularity: Granularity
    default: int
    profile_every: int
    audit_every: int
    window: int
    probes: int
    group: int | None
    smallest: int
    recompute: bool
    seed: int
