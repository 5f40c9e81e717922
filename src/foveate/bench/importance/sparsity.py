"""Zero tiles: what they are worth beside 2 and 3 bits, and what half of them save in memory and in time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

import torch

from foveate.allocate.constraints import Constraints
from foveate.allocate.plan import allocate
from foveate.bench.importance.mixture import Text, windows
from foveate.bench.importance.stream import Lengths, Subject, mean_kl
from foveate.formats.levels import WEIGHT_LEVELS
from foveate.importance.tags import zero_share
from foveate.kernels.backends.table import ensure_loaded
from foveate.planes import PlaneTensor, from_codes, linear
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile

_LEAST_ZEROS = 0.05
_SEARCHES = 24


def with_zeros(profile: Profile, budget: Budget, share: float = _LEAST_ZEROS) -> PrecisionMap:
    """The map of least predicted loss with at least such a share of zero weights.

    Where the best map has fewer, the losses of level 0 are multiplied by the greatest factor below 1 that gives it.
    """
    constraints = Constraints(levels=WEIGHT_LEVELS)

    def at(factor: float) -> PrecisionMap:
        losses = {}
        for site in profile.weight_sites():
            table = profile.losses[site.name].clone()
            table[:, 0] *= factor
            losses[site.name] = table
        return allocate(replace(profile, losses={**profile.losses, **losses}), budget, constraints)

    best = at(1.0)
    low, high = 1e-6, 1.0
    for _ in range(_SEARCHES if zero_share(best) < share else 0):
        middle = (low * high) ** 0.5
        plan = at(middle)
        if zero_share(plan) >= share:
            low, best = middle, plan
        else:
            high = middle
    return best


def measure_zeros(one: Subject, texts: Mapping[str, Text], bits: float, lengths: Lengths) -> dict[str, float]:
    """KL with at least 5 % zero weights over KL without zeros, at so many average bits."""
    generator = torch.Generator().manual_seed(5)
    batches = [
        torch.cat([windows(text.held_out, 2, lengths.window, generator) for text in texts.values()])
        for _ in range(lengths.batches)
    ]
    without = allocate(one.profile, Budget(bits=bits))
    with_some = with_zeros(one.profile, Budget(bits=bits))
    free = allocate(one.profile, Budget(bits=bits), Constraints(levels=WEIGHT_LEVELS))
    first, second = mean_kl(one, [without, with_some], batches)
    return {
        "zeros_over_none_kl": second / first,
        "zeros_share": zero_share(with_some),
        "zeros_share_unforced": zero_share(free),
    }


def _planes(size: int) -> PlaneTensor:
    generator = torch.Generator().manual_seed(0)

    def codes() -> torch.Tensor:
        return torch.randint(0, 16, (size, size), dtype=torch.uint8, generator=generator)

    scale = torch.full((size, size // 128), 0.002)
    ones = torch.ones(2, 1).half()
    return from_codes(codes(), codes(), scale, torch.zeros_like(scale), ones, group=128, reach=0)


def measure_half_zero(size: int = 3072, copies: int = 6, rounds: int = 15) -> dict[str, float]:
    """Memory and time of products of one row with weights of which half the tiles are zero, over none, at 4 bits.

    Each round multiplies with every copy of the weight, all of which together exceed the caches. Tiles are dropped by
    `PlaneTensor.kept`; before that they are zero by their active level alone.

    Args:
        size: rows and columns of the weight.
        copies: how many weights there are.
        rounds: how many rounds are timed.
    """
    generator = torch.Generator().manual_seed(1)
    ensure_loaded()
    made = _planes(size)
    # `kept` copies the planes, so each of these lies in memory of its own
    all_four = [made.kept(torch.full((size // 16, size // 128), 4, dtype=torch.uint8)) for _ in range(copies)]
    half = torch.rand(size // 16, size // 128, generator=generator) < 0.5
    levels = torch.where(half, 0, 4).to(torch.uint8)
    tagged = [replace(planes, active_levels=levels[None].clone()) for planes in all_four]
    compacted = [planes.kept(levels) for planes in all_four]
    x, level = torch.randn(1, size, generator=generator), torch.tensor([8], dtype=torch.uint8)
    none = [torch.empty(0)]
    kinds = {"none": all_four, "tagged": tagged, "compacted": compacted}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode():
        for number in range(rounds + 2):
            for name, weights in kinds.items():
                started = time.perf_counter()
                for planes in weights:
                    linear(x, [planes], none, level)
                if number >= 2:
                    times[name].append(time.perf_counter() - started)
        same = all(
            torch.equal(linear(x, [a], none, level)[0], linear(x, [b], none, level)[0])
            for a, b in zip(tagged, compacted, strict=True)
        )
    return {
        "half_zero_memory": sum(p.nbytes() for p in compacted) / sum(p.nbytes() for p in all_four),
        "half_zero_time": median(b / a for a, b in zip(times["none"], times["compacted"], strict=True)),
        "half_zero_time_tagged": median(b / a for a, b in zip(times["none"], times["tagged"], strict=True)),
        "half_zero_same_outputs": float(same),
    }
