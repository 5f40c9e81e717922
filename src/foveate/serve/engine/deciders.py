"""Deciders: what moves levels in a server beside the manager, the operator and the requests, where it was asked for.

- *Inputs choose* (`foveate.adapt_to_input`): each token reads, weight by weight, one of the two maps around the index
  in force. The price is found at a map near 4.25 bits, and holds at every index, in units of the frontier's slope.
- *Importance follows* (`foveate.track_importance`): bits move, for the same bytes, to what the requests need. It
  decides between two steps. Shadow runs repeat finished requests as plain calls, without the cache that steps share.

`who_decides` says in sentences what each decider of a model gave.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from foveate.errors import BudgetError
from foveate.importance import Decision as Move
from foveate.importance import ImportanceTracker, TrackingOptions, track_importance
from foveate.inputs.adapt import AdaptOptions, adapt_to_input
from foveate.inputs.input_adaptation import InputAdaptation
from foveate.nn.levels import state_of
from foveate.nn.registry import registry_of
from foveate.nn.residency.registry import ResidentRegistry
from foveate.precision.frontiers import Frontier
from foveate.serve.engine.plain_calls import without_pages

#: The price of a byte is found at the map whose average bits are nearest to this.
_BITS = 4.25
#: At least so many bits are between the index and each of the two maps that a token chooses from.
_SPREAD = 0.25
_log = logging.getLogger("foveate")


class Deciders:
    """The further deciders of one served model.

    Args:
        model: a quantized model, on the frontier of its server.
        frontier: that frontier.
        adapt_on: batches on which the price of a byte is found; none if inputs do not choose.
        follow: how importance is followed; None if it is not.
        told: called with each move of importance.

    Attributes:
        fault: why importance is followed no more; empty while it is.

    Raises:
        BudgetError: the frontier has too few maps for inputs to choose from.
    """

    def __init__(
        self,
        model: nn.Module,
        frontier: Frontier,
        *,
        adapt_on: Sequence[Any],
        follow: TrackingOptions | None,
        told: Callable[[Move], None],
    ) -> None:
        self._model, self._follow, self._told = model, follow, told
        self.tracker: ImportanceTracker | None = None
        self._chosen: float | None = None
        self.fault = ""
        self.adapted = _adapted(model, frontier, adapt_on) if adapt_on else None

    def start(self) -> None:
        """Begin to follow importance."""
        if self._follow is not None:
            self.tracker = track_importance(self._model, options=self._follow, on_decision=self._told)

    @property
    def is_due(self) -> bool:
        """Whether importance is to decide at the next turn."""
        return self.tracker is not None and self.tracker.is_due

    def turn(self) -> Frontier | None:
        """Between two steps: decide what is due. The frontier of importance, if it is followed."""
        if self.tracker is None:
            return None
        if self.tracker.is_due:
            try:
                with without_pages(self._model):
                    self.tracker.step()
            except Exception as error:  # the answers go on
                self.fault = f"{type(error).__name__}: {error}"
                _log.exception("importance is followed no more")
                self.tracker.close()
                self.tracker = None
                return state_of(self._model).frontier
        return self.tracker.chain

    def answered(self, tokens: Sequence[int]) -> None:
        """A request was answered: its tokens, those of its prompt first, may be run again in shadow runs."""
        if self.tracker is not None and self._follow is not None and self._follow.shadow is not None and tokens:
            kept = torch.tensor([list(tokens[: self._follow.shadow.tokens])])
            self.tracker.show(input_ids=kept, use_cache=False)

    @property
    def mean_bits(self) -> float | None:
        """The mean bits of a weight that tokens chose lately; None before the first that chose, or if inputs do not."""
        if self.adapted is not None:
            self._chosen = self.adapted.present_bits or self._chosen
        return self._chosen

    def close(self) -> None:
        """Withdraw what was decided here."""
        for decider in (self.tracker, self.adapted):
            if decider is not None:
                decider.close()
        self.tracker = self.adapted = None


def _adapted(model: nn.Module, frontier: Frontier, batches: Sequence[Any]) -> InputAdaptation:
    inner = range(1, len(frontier) - 1)
    if not inner:
        raise BudgetError(f"inputs choose between maps of a frontier, and this one has {len(frontier)}")
    index = min(inner, key=lambda i: abs(frontier.bits(i) - _BITS))
    bits = [frontier.bits(i) for i in (index - 1, index, index + 1)]
    spread = max(_SPREAD, bits[0] - bits[1], bits[1] - bits[2])
    options = AdaptOptions(spread=spread, verdict=False)
    adapted = adapt_to_input(model, bits=bits[1], batches=batches, options=options, progress=False)
    if state_of(model).frontier is not frontier:
        adapted.close()
        raise BudgetError("the frontier has no two maps near enough for inputs to choose from: give it more maps")
    adapted.give_index_back()
    return adapted


def who_decides(model: nn.Module) -> list[dict[str, str]]:
    """What each decider of a live model gave, as `{"by": ..., "what": ...}`.

    Args:
        model: a quantized model.
    """
    state, registry = state_of(model), registry_of(model)
    chain = state.frontier
    found = [
        (
            state.frontier_by,
            f"the frontier: {len(chain)} maps, {chain.bits(0):.2f} to {chain.bits(len(chain) - 1):.2f} bits",
        )
    ]
    found += [(by, f"index {index}") for by, index in state.indices.items() if index]
    found += [(by, f"a floor: no index beyond {floor.on(chain)}") for by, floor in state.floors.items()]
    for by, adaptation in state.adaptations.items():
        low, high = adaptation.around(state.index, state.floor)
        which = f"map {high} or {low}, weight by weight" if low != high else f"map {high}"
        found.append((by, f"each token reads {which}"))
    found += [(by, f"{len(raised)} inputs are raised") for by, raised in state.raises.items() if raised]
    if state.requests:
        count = len(state.requests)
        found.append(("requests", f"{count} of late with {'precisions' if count > 1 else 'a precision'} of their own"))
    if isinstance(registry, ResidentRegistry):
        found.append(("memory", str(registry.report()).partition("\n")[0]))
    return [{"by": by, "what": what} for by, what in found]
