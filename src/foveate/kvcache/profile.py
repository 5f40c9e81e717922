"""The loss that packing a model's cache adds, and the levels of all heads that add least under a budget.

The losses come from `foveate.kvcache.calibrate`. The levels come from the solver that weights use too.

Legend: U units (heads of keys or values), H heads of a layer, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.allocate.problem import Choices
from foveate.allocate.solve import solve_bytes, solve_loss
from foveate.errors import BudgetError
from foveate.formats.levels import CACHE_LEVELS, cache_bits_of, check_cache_level
from foveate.kvcache.cache import WINDOW
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap, Site
from foveate.sizes import format_bytes

CHOICE = (2, 4, 8, 16)


@dataclass(frozen=True, eq=False)
class CacheProfile:
    """The loss that packing a model's cache adds at every level.

    Attributes:
        sites: two a layer, of kind `cache`, `...self_attn:cache.key` and `...:cache.value`; their tiles are heads.
        losses: for each site float32 [H, 5], nats per token at each of `CACHE_LEVELS`.
        samples: tokens that the losses are a mean over.
        itemsize: bytes of a number of the exact cache.
    """

    sites: tuple[Site, ...]
    losses: Mapping[str, Tensor]
    samples: int
    itemsize: int

    def __repr__(self) -> str:
        return f"CacheProfile({len(self.sites)} sites, {self.samples:,} tokens)"

    def uniform(self, level: int) -> PrecisionMap:
        """The map with every head at one level."""
        column = CACHE_LEVELS.index(check_cache_level(level))
        lost = sum(float(table[:, column].double().sum()) for table in self.losses.values())
        return PrecisionMap(self.sites, {s.name: level for s in self.sites}, predicted_loss=lost)

    def nbytes(self, plan: PrecisionMap, tokens: int, *, window: int = WINDOW, sequences: int = 1) -> int:
        """Bytes of a cache of `tokens` tokens with the levels of a map, the exact tokens included."""
        block = self.sites[0].group
        packed = max(tokens - window, 0) // block * block
        numbers = sum(s.rows * s.columns for s in self.sites)
        bits = sum(
            packed * s.columns * self._bits(level, s)
            for s in self.sites
            for level in _each(plan.levels[s.name], s.rows)
        )
        return sequences * (round(bits / 8) + (tokens - packed) * numbers * self.itemsize)

    def plan(
        self, budget: Budget, *, tokens: int | None = None, window: int = WINDOW, levels: Sequence[int] = CHOICE
    ) -> PrecisionMap:
        """The level of every head's keys and values under a budget.

        Args:
            budget: `bits`: on average for a number that is packed, ranges counted; `bytes`: of the whole cache of one
                sequence of `tokens` tokens, the exact ones included; `loss`: the limit on its loss, in nats per token.
            tokens: for `bytes`.
            window: for `bytes`, the tokens that stay exact, as given to `quantized_cache`.
            levels: those to choose among.

        Raises:
            BudgetError: nothing meets the budget; the message says the least possible.
            LevelError: a level that caches do not have.
        """
        if not isinstance(budget, Budget):
            raise BudgetError(f"budget (={budget!r}) is not a Budget, such as Budget(bits=4.0)")
        if budget.latency is not None:
            raise BudgetError("latency cannot be a budget of a cache: give bytes, bits or loss")
        chosen = tuple(sorted({check_cache_level(level) for level in levels}))
        if not chosen:
            raise BudgetError("levels is empty: give at least one of 2, 4, 8, 16, 32")
        problem = self._problem(chosen)
        if budget.loss is not None:
            return self._to_map(problem, solve_loss(problem, budget.loss))
        least = float(problem.cost_UL[:, 0].sum())
        numbers = sum(s.rows * s.columns for s in self.sites)
        if budget.bits is not None:
            note = f"no map averages {budget.bits:g} bits a cached number: the least is {8 * least / numbers:.4f}"
            return self._to_map(problem, solve_bytes(problem, budget.bits * numbers / 8 * (1 + 1e-9), note))
        if type(tokens) is not int or tokens < 1:
            raise BudgetError(f"tokens (={tokens!r}) must say how long the cache is that the bytes are for")
        assert isinstance(budget.bytes, int)
        packed = max(tokens - window, 0) // self.sites[0].group * self.sites[0].group
        exact = (tokens - packed) * numbers * self.itemsize
        note = (
            f"no map holds {tokens} tokens in {format_bytes(budget.bytes)}: the least is "
            f"{format_bytes(exact + packed * least)} ({math.ceil(exact + packed * least)} bytes)"
        )
        if budget.bytes < exact:
            raise BudgetError(note)
        room = (budget.bytes - exact) / packed if packed else math.inf
        return self._to_map(problem, solve_bytes(problem, room, note))

    def _bits(self, level: int, site: Site) -> float:
        exact = level >= 8 * self.itemsize
        return 8.0 * self.itemsize if exact else cache_bits_of(level, site.group)

    def _problem(self, levels: tuple[int, ...]) -> Choices:
        """Units are heads, in the order of the sites; costs are bytes per token."""
        columns = [CACHE_LEVELS.index(level) for level in levels]
        losses = torch.cat([self.losses[s.name][:, columns].double().cummin(1).values for s in self.sites])
        costs = [
            torch.tensor([s.columns * self._bits(level, s) / 8 for level in levels], dtype=torch.float64).expand(
                s.rows, -1
            )
            for s in self.sites
        ]
        return Choices(levels, losses, torch.cat(costs))

    def _to_map(self, problem: Choices, choice_U: Tensor) -> PrecisionMap:
        taken = torch.tensor(problem.levels, dtype=torch.uint8)[choice_U].split([s.rows for s in self.sites])
        levels = {s.name: bytes(part.tolist()) for s, part in zip(self.sites, taken, strict=True)}
        lost = float(problem.loss_UL.gather(1, choice_U[:, None]).sum())
        return PrecisionMap(self.sites, levels, predicted_loss=lost)


def _each(levels: int | bytes, heads: int) -> Sequence[int]:
    return [levels] * heads if isinstance(levels, int) else levels
