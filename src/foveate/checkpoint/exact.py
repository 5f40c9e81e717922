"""Exact tiles in a checkpoint folder: their values as they are, and which tiles they are.

The file holds `<site>|values` float16, bfloat16 or float32 [E, g, 16] and `<site>|tiles` int32 [E] for each weight that
has any. A head that lists the file lists the feature too, so a reader that does not know it refuses the folder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.checkpoint.folder import Folder
from foveate.checkpoint.head import EXACT_PART as PART
from foveate.errors import CheckpointError
from foveate.formats.packing import TILE_ROWS
from foveate.planes import EXACT_TYPES, ExactTiles, are_tiles
from foveate.precision.maps import Site


def tensors_of(name: str, exact: ExactTiles | None) -> dict[str, Tensor]:
    """What the file holds of a weight."""
    return {} if exact is None else {f"{name}|values": exact.values, f"{name}|tiles": exact.tiles}


def exact_sites(folder: Folder) -> list[Site]:
    """The weights that have exact tiles."""
    listed = folder.head.checksums.get(PART, {})
    return [s for s in folder.head.weight_sites() if f"{s.name}|values" in listed]


def exact_levels_in(folder: Folder) -> dict[str, Tensor]:
    """For each weight that has exact tiles their level, and 0 for its other tiles: uint8 [NT, G].

    Raises:
        CheckpointError: the file is damaged.
    """
    found = {}
    for site in exact_sites(folder):
        levels = torch.zeros(site.grid, dtype=torch.uint8)
        levels.view(-1)[_tiles(folder, site).long()] = 8 * _type(folder, site).itemsize
        found[site.name] = levels
    return found


def read_exact(folder: Folder, site: Site, kept: Tensor | None = None) -> ExactTiles | None:
    """The exact tiles of a weight, or those of a mask (bool [NT, G]); None if there are none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if f"{site.name}|values" not in folder.head.checksums.get(PART, {}):
        return None
    tiles, dtype = _tiles(folder, site), _type(folder, site)
    each = TILE_ROWS * site.group
    values = folder.read(PART, f"{site.name}|values", len(tiles) * each * dtype.itemsize)
    if values.shape != (len(tiles), site.group, TILE_ROWS):
        raise CheckpointError(f"{folder.path}: the exact values of {site.name} are malformed")
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{folder.path}: the exact values of {site.name} hold NaN or Inf")
    exact = ExactTiles(values.clone(), tiles, site.grid)
    return exact if kept is None else exact.chosen(kept)


def _type(folder: Folder, site: Site) -> torch.dtype:
    entry = folder.part(PART).entries.get(f"{site.name}|values")
    if entry is None or entry.dtype not in EXACT_TYPES:
        raise CheckpointError(f"{folder.path}: the exact values of {site.name} are malformed")
    return entry.dtype


def _tiles(folder: Folder, site: Site) -> Tensor:
    tiles = folder.read(PART, f"{site.name}|tiles", 4 * site.tiles)
    if tiles.dtype != torch.int32 or tiles.dim() != 1 or not tiles.numel() or not are_tiles(tiles, site.tiles):
        raise CheckpointError(f"{folder.path}: the exact tiles of {site.name} are not numbers of its tiles, ascending")
    return tiles.clone()
