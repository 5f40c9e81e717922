"""plan_memory: what would be in memory under a limit, and what that would cost, without loading any plane."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate import checkpoint
from foveate.checkpoint import PathLike
from foveate.errors import BudgetError
from foveate.memory.policy import hot
from foveate.nn.residency.following import AUTO, first_limit
from foveate.precision.maps import Levels, PrecisionMap, input_level_for
from foveate.precision.profiles import Profile
from foveate.sizes import format_bytes, parse_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a limit does to a model.

    Attributes:
        limit: bytes that the model may take.
        fixed: bytes of all that always stays: scales, tile index, what is not on planes.
        stays: bytes of planes that would be in memory.
        waits: bytes of planes that would stay on disk.
        plan: the map that could be read from memory.
        whole: the map of all planes that the folder stores.
        predicted_loss, whole_loss: what the profile predicts for both, in the unit of the objective; NaN without one.
    """

    limit: int
    fixed: int
    stays: int
    waits: int
    plan: PrecisionMap
    whole: PrecisionMap
    predicted_loss: float
    whole_loss: float


def plan_memory(path: PathLike, memory: int | str) -> MemoryPlan:
    """Say what `foveate.load(path, memory=memory)` would have in memory.

        print(fv.plan_memory("out/", "300MiB").predicted_loss)

    Args:
        path: a folder that `save` wrote.
        memory: bytes, `"300MiB"` or a number, or `"auto"` for what is free now.

    Raises:
        BudgetError: `memory` is no size, or less than the least possible, which the message says.
        CheckpointError: the folder is missing or damaged.
    """
    limit = first_limit().limit if memory == AUTO else parse_bytes(memory)
    with checkpoint.opened(path) as folder:
        head = folder.head
        tiers = checkpoint.read_tiers(folder)
        profile = checkpoint.read_profile(folder) if head.profile is not None else None
    held = tiers.held
    runs = list(zip(held.runs, tiers.importance, held.below, strict=True))
    items = [hot.Item(size=run.size, value=value, below=below) for run, value, below in runs]
    floor = frozenset(n for n, run in enumerate(held.runs) if run.plane == 0)
    least = held.fixed + sum(items[n].size for n in floor)
    held.close()
    if limit < least:
        raise BudgetError(
            f"memory (={format_bytes(limit)}) is less than the least possible needs, {format_bytes(least)} "
            f"({least} bytes)"
        )
    goal = hot.goal_of(items, hot.order_of(items, floor), limit - held.fixed)
    stays = sum(items[n].size for n in goal)
    plan, whole = (_map(head, tiers, numbers) for numbers in (goal, frozenset(range(len(items)))))
    return MemoryPlan(
        limit=limit,
        fixed=held.fixed,
        stays=stays,
        waits=sum(item.size for item in items) - stays,
        plan=plan,
        whole=whole,
        predicted_loss=_loss(profile, plan),
        whole_loss=_loss(profile, whole),
    )


def _map(head: checkpoint.Head, tiers: checkpoint.Tiers, present: frozenset[int]) -> PrecisionMap:
    """The map that can be read where these runs are in memory."""
    levels: dict[str, Levels] = {}
    mean: dict[str, float] = {}
    for site in head.weight_sites():
        tiles = torch.minimum(tiers.stored[site.name], tiers.held.caps(site.name, present)[:, None])
        levels[site.name] = bytes(tiles.flatten().tolist())
        mean.update(dict.fromkeys((site.name, *site.aliases), float(tiles.float().mean()) if tiles.numel() else 0.0))
    for site in head.sites:
        if site.kind == "input":
            levels[site.name] = input_level_for(mean[f"{site.name.removesuffix(':input')}:weight"])
    return PrecisionMap(head.sites, levels, head.other_bytes, other_parameters=head.other_parameters)


def _loss(profile: Profile | None, plan: PrecisionMap) -> float:
    return float("nan") if profile is None else profile.predict(plan)
