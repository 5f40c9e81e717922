"""How the statistics of parts of the data are put together: most are sums, some are ranges.

A statistic is named as in `Collector.state`: `module|statistic`, `module|input statistic`, or a count.
"""

from __future__ import annotations

import math

from torch import Tensor

#: Statistics that hold the least values first and the greatest second.
RANGES = frozenset({"output_range", "input range", "input batch_moments"})
#: Statistics that take a matrix for each weight, and are needed only where the weight is rounded.
MATRICES = frozenset({"covariance_KK", "fisher_NK", "gradients_BRR"})


def statistic_of(key: str) -> str:
    """The name of a statistic without its module."""
    return key.rpartition("|")[2]


def clear(key: str, tensor: Tensor) -> None:
    """Set a statistic, in place, to what it is before any data."""
    if statistic_of(key) in RANGES:
        tensor[0], tensor[1] = math.inf, -math.inf
    else:
        tensor.zero_()


def add(key: str, total: Tensor, part: Tensor) -> None:
    """Add the statistic of more data to a total, in place."""
    if statistic_of(key) in RANGES:
        total[0] = total[0].minimum(part[0])
        total[1] = total[1].maximum(part[1])
    else:
        total.add_(part)
