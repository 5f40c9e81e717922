"""Statistics of one site's values over the last profiled batches, and the group size that follows from them.

Each group of g values is stored with its own minimum and step, so the noise of rounding follows the groups' ranges:
its variance is R^2 / 6 B^2 on average, B = 2^bits - 1. An outlier widens the range of the group that has it. Smaller
groups confine that to fewer values, and cost 32 bits per group. The ranges of groups of any size follow from the
histogram, if values are taken to be in random order:

    P(all g values within [a, b]) = (F(b) - F(a))^g,   from which follows E[R^2]

One more bit per value divides the variance of the noise by 4. So the group size g is the one that makes
E[R^2] 4^(32 / g) smallest. Statistics choose only the group: the bits follow from errors of the gradient (`ledger.py`).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from foveate.errors import BudgetError

#: The groups to choose from.
GROUPS: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
_DEFAULT_GROUP = 256
_OUTLIER = 6.0  # deviations
_BINS = 1024
_COARSE = 256  # cells of the entropy
_CELLS = 128  # of the ranges
_RANGE_BITS = 32  # a group's least value and step


@dataclass(frozen=True)
class Summary:
    """Statistics of some values. Shares are of the finite ones, and every number is 0 where there are none.

    Attributes:
        batches: that it covers.
        count, not_finite: values.
        mean, deviation, least, greatest: of the values.
        zeros: share that is exactly 0.
        outliers: share further than 6 deviations from its batch's mean, to a bin of the histogram.
        entropy: bits per value, of 256 equal cells between a batch's extremes: 0 of a constant, 8 if all are equal.
        group_ranges: E[R^2] of groups of each of `GROUPS` values.
    """

    batches: int
    count: int
    not_finite: int
    mean: float
    deviation: float
    least: float
    greatest: float
    zeros: float
    outliers: float
    entropy: float
    group_ranges: tuple[float, ...]

    def group(self) -> int:
        """The values that should share a minimum and a step; the default where they are constant or none."""
        if not self.deviation:
            return _DEFAULT_GROUP
        return min(GROUPS, key=lambda g: self.group_ranges[GROUPS.index(g)] * 4 ** (_RANGE_BITS / g))

    def to_json(self) -> dict[str, float | list[float]]:
        """The same as plain values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def _group_ranges(histogram: Tensor, width: float) -> tuple[float, ...]:
    """E[R^2] for each of `GROUPS`, of values drawn independently; a value lies anywhere in its bin."""
    below_E = torch.cat([histogram.new_zeros(1, dtype=torch.float64), histogram.double().cumsum(0)])
    below_E = below_E / below_E[-1]
    inside_EE = (below_E[None, :] - below_E[:, None]).clamp_min(0)
    steps = torch.arange(len(histogram), dtype=torch.float64)
    # least in bin i, greatest in bin j: apart by j - i bins, or, of a full group in one bin, by nearly one
    square_BB = (steps[None, :] - steps[:, None]).square().triu()
    found = []
    power = 1
    for group in GROUPS:
        while power < group:  # all are powers of 2
            inside_EE, power = inside_EE.square(), 2 * power
            inside_EE.masked_fill_(inside_EE < 1e-100, 0.0)  # or the squares become denormal, and slow
        exactly_BB = inside_EE[:-1, 1:] - inside_EE[1:, 1:] - inside_EE[:-1, :-1] + inside_EE[1:, :-1]
        square = float((exactly_BB * square_BB).sum() + exactly_BB.diagonal().sum())
        found.append(square * width**2)
    return tuple(found)


def _summarise(flat: Tensor) -> Summary:
    numbers, histogram = torch.ops.foveate.moments(flat, _BINS)
    count, mean, squares, least, greatest, zeros, not_finite = numbers.tolist()
    nothing = (0.0,) * len(GROUPS)
    if not count:
        return Summary(1, 0, int(not_finite), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, nothing)
    deviation = math.sqrt(squares / count)
    share_B = histogram.double() / count
    centre_B = least + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * ((greatest - least) / _BINS)
    outliers = float(share_B[(centre_B - mean).abs() > _OUTLIER * deviation].sum()) if deviation else 0.0
    coarse = histogram.view(_COARSE, -1).sum(1)
    p = coarse[coarse > 0].double() / count
    cells = histogram.view(_CELLS, -1).sum(1)
    ranges = _group_ranges(cells, (greatest - least) / _CELLS) if greatest > least else nothing
    return Summary(
        1,
        int(count),
        int(not_finite),
        mean,
        deviation,
        least,
        greatest,
        zeros / count,
        outliers,
        max(float(-(p * p.log2()).sum()), 0.0),
        ranges,
    )


class RunningStatistics:
    """The statistics of one site over its last batches.

    Args:
        window: batches that count.

    Attributes:
        group: the values that should share a minimum and a step; the default before the first batch.

    Raises:
        BudgetError: `window` is not at least 1.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise BudgetError(f"window (={window}) must be at least 1")
        self._batches: deque[Summary] = deque(maxlen=window)
        self.group = _DEFAULT_GROUP

    def add(self, x: Tensor) -> None:
        """Add the values of one batch: float32, bfloat16 or float16, of any shape."""
        self._batches.append(_summarise(x.detach()))
        self.group = self.summary().group()

    def summary(self) -> Summary:
        """Of the batches in the window together; shares, entropy and ranges are means weighted by their values."""
        batches = self._batches
        seen = [batch for batch in batches if batch.count]
        count = sum(batch.count for batch in seen)
        weights = [batch.count / count for batch in seen]

        def mean(values: list[float]) -> float:
            return math.fsum(w * v for w, v in zip(weights, values, strict=True))

        centre = mean([b.mean for b in seen])
        variance = mean([b.deviation**2 + (b.mean - centre) ** 2 for b in seen])
        return Summary(
            len(batches),
            count,
            sum(b.not_finite for b in batches),
            centre,
            math.sqrt(variance),
            min((b.least for b in seen), default=0.0),
            max((b.greatest for b in seen), default=0.0),
            mean([b.zeros for b in seen]),
            mean([b.outliers for b in seen]),
            mean([b.entropy for b in seen]),
            tuple(mean([b.group_ranges[i] for b in seen]) for i in range(len(GROUPS))),
        )
