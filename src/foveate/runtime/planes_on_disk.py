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
        self._registry, self._frontier = registry, frontier
        self._most = self._set = registry.residency.limit
        self.resident = tuple(min(self._most, registry.bytes_of(plan)) for plan in frontier)

    def __call__(self, index: int) -> None:
        """Have the model take what an index reads. Planes leave before this returns, and come in the background."""
        state = self._registry.generations.state
        if state is not None and state.adaptation is not None and state.frontier is self._frontier:
            index = state.adaptation.around(index, len(self._frontier) - 1)[1]  # inputs may read the map before
        self._notice_others()
        self._set = min(self._most, self.resident[index])
        self._registry.resize(self._set)

    def end(self) -> None:
        """Set the limit that there was before, or that somebody has set since."""
        self._notice_others()
        if self._set != self._most:
            self._set = self._most
            self._registry.resize(self._most)

    def _notice_others(self) -> None:
        """Where somebody else has set the limit, it is the most from now on."""
        limit = self._registry.residency.limit
        if limit != self._set:
            self._most = self._set = limit


def planes_along(model: nn.Module, frontier: Frontier) -> PlanesAlong | None:
    """What moves the planes of a model along a frontier; None where all are in memory, or follow what is free."""
    registry = registry_of(model)
    if not isinstance(registry, ResidentRegistry) or registry.auto is not None:
        return None
    return PlanesAlong(registry, frontier)
