"""Monotone curves through measurements: nearest ordered values, and what lies between two of them.

Measurements of a chain of maps are noisy, so the loss of a cheaper map may come out a little below that of a better
one. `ordered` replaces such values by the nearest ones that rise (Ayer et al. 1955, "pool adjacent violators"). Between
two measurements `between` follows a coordinate that is known for every map, such as the predicted loss or the bytes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence


def ordered(values: Sequence[float]) -> list[float]:
    """The least-squares fit that never falls: each run of values out of order becomes its mean.

    ordered([1.0, 3.0, 2.0])  # [1.0, 2.5, 2.5]
    """
    blocks: list[tuple[float, int]] = []  # the mean and the length of each block
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def between(at: float, places: Sequence[float], values: Sequence[float], *, ratios: bool = False) -> float:
    """The value at a place, on the line between the two measured places around it; beyond the ends, the end's value.

    between(1.5, [1.0, 2.0], [10.0, 30.0])  # 20.0

    Args:
        at: the place.
        places: the measured places, in ascending order.
        values: the value at each of them.
        ratios: draw the line on logarithmic axes, where both ends of a segment are positive.
    """
    after = min(max(bisect_right(places, at), 1), len(places) - 1) if len(places) > 1 else 0
    if not after:
        return values[0]
    x0, x1, y0, y1 = places[after - 1], places[after], values[after - 1], values[after]
    if not x1 > x0 or math.isinf(x1):
        return y1 if at >= x1 else y0
    at = min(max(at, x0), x1)
    if ratios and min(x0, y0, y1) > 0:  # differences of logarithms: a ratio may be too large for a number
        share = (math.log(at) - math.log(x0)) / (math.log(x1) - math.log(x0))
        quarter = math.exp(share * (math.log(y1) - math.log(y0)) / 4)
        found = y0 * quarter * quarter * quarter * quarter
    else:
        found = y0 + (y1 - y0) * ((at - x0) / (x1 - x0))
    return min(max(found, min(y0, y1)), max(y0, y1))
