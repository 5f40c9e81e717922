"""What the indices of a frontier cost, as far as it is known of a model."""

from __future__ import annotations

import itertools
import math

from torch import nn

from foveate.nn.registry import profile_of
from foveate.precision.frontiers import Frontier
from foveate.runtime.policy import Costs


def known_costs(model: nn.Module, chain: Frontier) -> Costs:
    """Costs as they were measured, or else by the losses that the profile predicts. None is below that of the map
    before, for a chain is nested.
    """
    if chain.points:
        indices = range(len(chain))
        timed = all(point.seconds is not None for point in chain.points)
        seconds = tuple(chain.seconds(i) for i in indices) if timed else ()
        return Costs(kl=tuple(chain.kl(i) for i in indices), seconds_per_token=seconds)
    known = [plan.predicted_loss for plan in chain]
    if any(not math.isfinite(loss) for loss in known):
        profile = profile_of(model)
        known = [profile.predict(plan) for plan in chain]
    return Costs(kl=tuple(itertools.accumulate((max(loss, 0.0) for loss in known), max)))
