"""Costs: what a map takes in one unit, and how much more of it each weight takes in a better map.

An average can be asked for in bits of a weight, in bytes that a token reads, or in seconds of a token. The units differ
in what a weight counts: an embedding of which a token looks up one row has many bits and hardly any bytes, and a plane
that is read while the processor waits anyway takes bytes and no time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from foveate.precision.maps import PrecisionMap, Site
from foveate.precision.timings import Timings
from foveate.sizes import format_bytes, format_seconds


class Cost(ABC):
    """One unit in which maps are counted."""

    @abstractmethod
    def of(self, plan: PrecisionMap) -> float:
        """What a map takes."""

    @abstractmethod
    def between(self, low: PrecisionMap, high: PrecisionMap) -> dict[str, float]:
        """For each weight how much more it takes in the higher of two maps."""

    @abstractmethod
    def text(self, amount: float) -> str:
        """An amount with its unit."""


@final
@dataclass(frozen=True)
class Bits(Cost):
    """Average bits of a weight, scales included (`PrecisionMap.bits`)."""

    def of(self, plan: PrecisionMap) -> float:
        """As `Cost.of`."""
        return plan.bits

    def between(self, low: PrecisionMap, high: PrecisionMap) -> dict[str, float]:
        """As `Cost.between`."""
        weights = max(sum(site.weights for site in low.weight_sites()), 1)
        return {site.name: 8.0 * _more_bytes(site, low, high) / weights for site in low.weight_sites()}

    def text(self, amount: float) -> str:
        """As `Cost.text`."""
        return f"{amount:g} bits"


@final
@dataclass(frozen=True)
class BytesRead(Cost):
    """Bytes that a token reads (`PrecisionMap.bytes_read`): of an expert, or of an embedding, its share of them."""

    def of(self, plan: PrecisionMap) -> float:
        """As `Cost.of`."""
        return float(plan.bytes_read)

    def between(self, low: PrecisionMap, high: PrecisionMap) -> dict[str, float]:
        """As `Cost.between`."""
        return {
            site.name: _more_bytes(site, low, high) * site.rows_read / max(site.rows, 1) for site in low.weight_sites()
        }

    def text(self, amount: float) -> str:
        """As `Cost.text`."""
        return f"{format_bytes(amount)} a token"


@final
@dataclass(frozen=True)
class Seconds(Cost):
    """Seconds of a token, or of a sample, by the times of one machine (`Timings.seconds_of`).

    Attributes:
        timings: the times.
    """

    timings: Timings

    def of(self, plan: PrecisionMap) -> float:
        """As `Cost.of`."""
        return self.timings.seconds_of(plan)

    def between(self, low: PrecisionMap, high: PrecisionMap) -> dict[str, float]:
        """As `Cost.between`."""
        of = self.timings.seconds_of_weight
        return {site.name: max(of(high, site) - of(low, site), 0.0) for site in low.weight_sites()}

    def text(self, amount: float) -> str:
        """As `Cost.text`."""
        return f"{format_seconds(amount)} a token"


def _more_bytes(site: Site, low: PrecisionMap, high: PrecisionMap) -> int:
    return high.tile_bytes(site) - low.tile_bytes(site)
