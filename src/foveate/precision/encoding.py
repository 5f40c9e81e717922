"""The levels of a map as blocks of bytes: what a live model copies when it switches.

Making the blocks takes a step of Python for each site, so they are made when a frontier is, not when a model switches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from foveate.errors import LevelError, SiteError
from foveate.precision.maps import PrecisionMap
from foveate.precision.sites import Levels


@dataclass(frozen=True, kw_only=True)
class EncodedLevels:
    """The levels of one map, in the order of its sites.

    Attributes:
        weights: one byte for each tile of each weight, the weights one after another.
        inputs: one byte for each input.
    """

    weights: bytes
    inputs: bytes


def encoded_levels(plan: PrecisionMap) -> EncodedLevels:
    """The levels of a map as bytes.

    encoded_levels(profile.uniform(4)).weights  # b"\\x04\\x04..."

    Raises:
        LevelError: the map has sites that are neither weights nor inputs, such as caches.
    """
    weights: list[bytes] = []
    inputs = bytearray()
    for site in plan.sites:
        level = plan.levels[site.name]
        if site.kind == "weight":
            weights.append(bytes((level,)) * site.tiles if isinstance(level, int) else level)
        elif site.kind == "input":
            inputs.append(cast(int, level))
        else:
            raise LevelError(f"{site.name} is a {site.kind}: only levels of weights and inputs are encoded")
    return EncodedLevels(weights=b"".join(weights), inputs=bytes(inputs))


def first_rise(better: PrecisionMap, cheaper: PrecisionMap) -> str | None:
    """The first site that has a higher level somewhere in `cheaper` than in `better`; None if the maps are nested.

    Raises:
        SiteError: the maps are of different models.
    """
    if better.sites is not cheaper.sites and better.sites != cheaper.sites:
        raise SiteError("the maps are of different models: their sites differ")
    for site in better.sites:
        if _rises(better.levels[site.name], cheaper.levels[site.name]):
            return site.name
    return None


def _rises(before: Levels, after: Levels) -> bool:
    if before is after or before == after:
        return False
    if isinstance(before, int):
        return (after if isinstance(after, int) else max(after)) > before
    if isinstance(after, int):
        return after > min(before)
    old, new = (torch.frombuffer(bytearray(levels), dtype=torch.uint8) for levels in (before, after))
    return bool((new > old).any())
