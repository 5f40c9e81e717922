"""The point of a frontier at a wanted KL: interpolation in log KL, and a search with measurements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

#: A size (bits, bytes or time) and the KL that was measured at it.
Point = tuple[float, float]


def between(low: Point, high: Point, kl: float) -> float:
    """The size at a KL on the line through two points, where KL is on a logarithmic scale."""
    (size, first), (other, last) = low, high
    if first == last:
        return max(size, other)
    share = (math.log(kl) - math.log(first)) / (math.log(last) - math.log(first))
    return size + share * (other - size)


def interpolated(points: Sequence[Point], kl: float) -> float | None:
    """The smallest size whose interpolated KL is `kl`; None outside of the points' range.

        interpolated([(2.0, 0.1), (4.0, 0.001)], 0.01)  # 3.0

    Args:
        points: sizes and their KL, in any order.
        kl: a positive number.
    """
    ordered = sorted(points)
    for low, high in itertools.pairwise(ordered):
        if low[1] >= kl >= high[1]:
            return between(low, high, kl)
    return None


def smallest_within(
    measure: Callable[[float], float], points: Sequence[Point], kl: float, *, tolerance: float = 0.03, tries: int = 5
) -> Point | None:
    """The smallest size that was measured to have at most a KL.

    It interpolates between the two measured points around the KL, measures there, and goes on until a measured KL is
    within the tolerance below the wanted one.

    Args:
        measure: gives the KL of a size.
        points: what is measured already.
        kl: the wanted KL.
        tolerance: by which share the KL found may be smaller.
        tries: the most measurements.

    Returns:
        The size and its KL, or None where even the largest size has a higher KL. If the smallest size has a lower KL,
        it is returned.
    """
    known = sorted(points)
    within = [p for p in known if p[1] <= kl]
    if not within:
        return None
    best = within[0]
    aim = kl * (1 - tolerance / 2)
    for _ in range(tries):
        above = [p for p in known if p[0] < best[0]]
        if not above or best[1] >= kl * (1 - tolerance):
            break
        size = between(above[-1], best, aim)
        found = (size, measure(size))
        known = sorted([*known, found])
        if found[1] <= kl:
            best = found
    return best
