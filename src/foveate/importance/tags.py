"""Tags and zones: what each tile of a live model is worth, and at which level it is read, as values.

A tag is a tile's level, its importance, and whether it is zero (level 0: no plane of it is read). A zone is a run of
tiles of one level, as an index range. Both follow from the map in force and the importance of now, so a tile that moves
has its new tag from the next pass on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from foveate.errors import CheckpointError
from foveate.files import TensorFile, replacing
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile
from foveate.precision.sites import Site, tile_levels

_KIND = "foveate tags 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class TileTags:
    """The tags of one weight's tiles.

    Attributes:
        level: uint8 [NT, G], the level at which each tile is read.
        importance: float32 [NT, G], the loss that the tile would cost if it were zero, in the objective's unit a
            token, for the data of now.
    """

    level: Tensor
    importance: Tensor

    @property
    def zero(self) -> Tensor:
        """Whether each tile is zero, bool [NT, G]."""
        return self.level == 0


@dataclass(frozen=True, kw_only=True)
class Zone:
    """A run of tiles of one level: those from `start` to before `stop` of a site, in the order nt * G + gi."""

    site: str
    level: int
    start: int
    stop: int


def tags_of(plan: PrecisionMap, profile: Profile, ratios: Mapping[str, Tensor]) -> dict[str, TileTags]:
    """The tags of every weight.

    Args:
        plan: the map in force.
        profile: the losses at calibration.
        ratios: by what they are multiplied now, float64 [T].
    """
    found = {}
    for site in plan.weight_sites():
        level = torch.frombuffer(bytearray(tile_levels(plan.levels[site.name], site.tiles)), dtype=torch.uint8)
        importance = (profile.losses[site.name][:, 0].double() * ratios[site.name]).float()
        found[site.name] = TileTags(level=level.view(site.grid), importance=importance.view(site.grid))
    return found


def zones(plan: PrecisionMap) -> Iterator[Zone]:
    """The zones of a map, weight by weight.

    >>> [(zone.level, zone.stop - zone.start) for zone in zones(plan) if zone.site == name]
    """
    for site in plan.weight_sites():
        at = 0
        for level, run in groupby(tile_levels(plan.levels[site.name], site.tiles)):
            length = len(list(run))
            yield Zone(site=site.name, level=level, start=at, stop=at + length)
            at += length


def zero_share(plan: PrecisionMap) -> float:
    """The share of a map's weights that are in tiles of level 0, 0 to 1."""
    zeros = total = 0
    for site in plan.weight_sites():
        zeros += plan.counts(site)[0] * 16 * site.group
        total += site.tiles * 16 * site.group
    return zeros / max(total, 1)


def save_tags(path: str | os.PathLike[str], tags: Mapping[str, TileTags]) -> None:
    """Write tags to a safetensors file of their own, beside a model. The file is complete or as it was before.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {f"{name}/level": one.level.contiguous() for name, one in tags.items()}
    tensors |= {f"{name}/importance": one.importance.contiguous() for name, one in tags.items()}
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(save(tensors, metadata={"kind": _KIND}))
    except OSError as error:
        raise CheckpointError(f"the tags {path} cannot be written: {error}") from error


def load_tags(path: str | os.PathLike[str], sites: tuple[Site, ...]) -> dict[str, TileTags]:
    """Read the tags of a model's sites.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a file of tags, is damaged, or is of another model.
    """
    weights = {site.name: site.grid for site in sites if site.kind == "weight"}
    with TensorFile(Path(path)) as file:
        if file.metadata.get("kind") != _KIND:
            raise CheckpointError(f"{path} is not a file of tags")
        if set(file.entries) != {f"{name}/{part}" for name in weights for part in ("level", "importance")}:
            raise CheckpointError(f"{path} has the tags of another model")
        found = {}
        for name, grid in weights.items():
            level, importance = file.read(f"{name}/level"), file.read(f"{name}/importance")
            sound = level.dtype == torch.uint8 and importance.dtype == torch.float32
            if not sound or level.shape != grid or importance.shape != grid:
                raise CheckpointError(f"{path} is damaged: the tags of {name} do not have its tiles")
            found[name] = TileTags(level=level, importance=importance)
    return found
