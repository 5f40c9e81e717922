"""Which rows a statistic is taken from, where not all are needed.

The error of a mean falls with the root of the number of rows, and the cost of a statistic grows with the number. So
each statistic has a number of rows that is enough, and what goes beyond is sampled: from n times that many rows on, one
row in n is taken and counts n times, up to one in eight. The sum estimates that over all rows without
bias, and early data weigh no more than late data. Which rows are taken follows from what was seen before, so the same
data give the same rows; the first row of a call moves on with each call, because the first tokens of a text are unlike
all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: At least one row in so many is taken.
MOST_SKIPPED = 8


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The rows of one call that a statistic is taken from.

    Attributes:
        rows: which of the rows.
        weight: how often each counts, so that together they count as all rows of the call.
        count: how many rows are taken.
    """

    rows: slice
    weight: float
    count: int


class RowSampler:
    """Decides which rows of each call are taken; `counts` is its state.

    Attributes:
        counts: float64 [3]: the rows seen, the rows taken, the calls.

    Example:
        >>> sampler = RowSampler(torch.zeros(3, dtype=torch.float64), enough=1024)
        >>> sampler.take(1024).rows, sampler.take(1024).rows, sampler.take(1024).rows
        (slice(0, None, 1), slice(1, None, 2), slice(2, None, 3))
    """

    def __init__(self, counts: Tensor, enough: int) -> None:
        """
        Args:
            counts: the state, changed in place.
            enough: the number of rows up to which all are taken.
        """
        self.counts, self._enough = counts, max(enough, 1)

    def take(self, rows: int) -> Taken:
        """Choose among the rows of the next call, of which there is at least one."""
        seen, _, calls = (int(n) for n in self.counts.tolist())
        every = min(max((seen + rows) // self._enough, 1), MOST_SKIPPED, rows)
        chosen = slice(calls % every, None, every)
        count = len(range(*chosen.indices(rows)))
        self.counts += torch.tensor([rows, count, 1], dtype=torch.float64)
        return Taken(rows=chosen, weight=rows / count, count=count)
