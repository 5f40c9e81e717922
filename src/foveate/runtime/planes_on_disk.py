"""Planes that the manager gives back with a fall and fetches before a rise, where the model's planes come and go."""

from __future__ import annotations

from torch import nn

from foveate.nn.registry import registry_of
from foveate.nn.residency.registry import ResidentRegistry
from foveate.precision.frontiers import Frontier


class PlanesAlong:
    """Moves the limit of a model's memory along a frontier, never above what it was before.

    Attributes:
        resident: the bytes that the model takes at each index.
    """

    def __init__(self, registry: ResidentRegistry, frontier: Frontier) -> None:
        self._registry, self._most = registry, registry.residency.limit
        self.resident = tuple(min(self._most, registry.bytes_of(plan)) for plan in frontier)

    def __call__(self, index: int) -> None:
        """Have the model take what an index reads. Planes leave before this returns, and come in the background."""
        self._registry.resize(self.resident[index])

    def end(self) -> None:
        """Set the limit that there was before."""
        self._registry.resize(self._most)


def planes_along(model: nn.Module, frontier: Frontier) -> PlanesAlong | None:
    """What moves the planes of a model along a frontier; None where all are in memory, or follow what is free."""
    registry = registry_of(model)
    if not isinstance(registry, ResidentRegistry) or registry.auto is not None:
        return None
    return PlanesAlong(registry, frontier)
