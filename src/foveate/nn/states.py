"""What a state_dict holds of a weight on planes, and how a weight is read back from one.

Beside the stored tensors a state holds their geometry: rows, columns, inputs in a group, reach, and the exponent of the
scales. Without the exponent the same bytes would be weights that differ by powers of two. A weight is checked as a
whole before anything of it is loaded; where a whole model is loaded, all of its weights are checked before any is
loaded. Active levels are not in a state: they belong to the map in force.

Shapes: NT strips of 16 rows, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.errors import StateError
from foveate.formats.grids import EXPONENTS
from foveate.formats.levels import NESTED_LEVELS, PLANES, REACHES, WEIGHT_LEVELS
from foveate.formats.packing import SCALE_BYTES, TILE_ROWS, tile_bytes, tile_offsets_of
from foveate.planes import EXACT_TYPES, ExactTiles, PlaneTensor, are_tiles, gathered, highest

#: The tensors of a weight that a state holds, in the order of `PlaneTensor.tensors`.
STORED = (*(f"plane{i}" for i in range(PLANES)), "scales", "gain", "tile_offsets", "stored_levels")
#: Those of its exact tiles, which only a weight with exact tiles has: their values, and their numbers.
EXACT = ("exact_values", "exact_tiles")
#: int64 [5], see `geometry_of`.
GEOMETRY = "geometry"


def geometry_of(planes: PlaneTensor) -> Tensor:
    """Rows, columns, inputs in a group, reach and exponent, int64 [5]."""
    return torch.tensor(planes.geometry, dtype=torch.int64, device="cpu")


def weight_in(state: Mapping[str, Any], prefix: str, present: PlaneTensor) -> PlaneTensor | None:
    """The weight that a state holds under a prefix, in the state's own tensors and with the present active levels.

    Returns:
        None where the state does not hold all of a weight.

    Raises:
        StateError: what the state holds is malformed, or does not fit the present weight.
    """
    name = prefix.rstrip(".") or "the weight"
    found = {key: state[prefix + key] for key in (*STORED, GEOMETRY) if prefix + key in state}
    exact = {key: state[prefix + key] for key in EXACT if prefix + key in state}
    if GEOMETRY not in found and len(found) == len(STORED):
        raise StateError(
            f"{name}: the state does not say the geometry of its planes ({prefix}{GEOMETRY}), without which weights "
            "would be wrong by powers of two: it is of an older foveate; load that model with it, and save it with "
            "foveate.save"
        )
    if len(found) <= len(STORED):
        return None
    found.update(exact)
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise StateError(f"{name}: {key} of the state is no tensor that holds values")
    try:
        return _checked({key: value.detach() for key, value in found.items()}, present)
    except StateError as error:
        raise StateError(f"{name}: {error}") from None


def _checked(found: dict[str, Tensor], present: PlaneTensor) -> PlaneTensor:
    geometry = found[GEOMETRY]
    if geometry.dtype != torch.int64 or geometry.shape != (len(present.geometry),):
        raise StateError(
            f"the geometry is {geometry.dtype} {list(geometry.shape)}, not int64 [{len(present.geometry)}]"
        )
    rows, columns, group, reach, exponent = geometry.tolist()
    if (rows, columns, group) != present.geometry[:3]:
        raise StateError(
            f"size mismatch, the state has {rows} x {columns} in groups of {group}, "
            f"the model {present.rows} x {present.columns} in groups of {present.group}"
        )
    if reach not in REACHES or exponent not in EXPONENTS:
        raise StateError(f"reach (={reach}) is not one of 0, 1, 2, 3, or exponent (={exponent}) not in -64..32")
    stored_levels = found["stored_levels"]
    _check("stored_levels", stored_levels, present.stored_levels.dtype, present.stored_levels.shape)
    if not bool(
        torch.isin(stored_levels, torch.tensor(WEIGHT_LEVELS, dtype=torch.uint8, device=stored_levels.device)).all()
    ):
        raise StateError("stored_levels has a level that is not one of 0, 2, 3, 4, 6, 8")
    _check("gain", found["gain"], present.gain.dtype, present.gain.shape)
    for i in range(PLANES):
        stored = int((stored_levels >= NESTED_LEVELS[i]).sum())
        _check(f"plane{i}", found[f"plane{i}"], torch.uint8, (stored * tile_bytes(i, group),))
    _check("scales", found["scales"], torch.uint8, (int((stored_levels > 0).sum()) * SCALE_BYTES,))
    _check("tile_offsets", found["tile_offsets"], torch.int64, present.tile_offsets.shape)
    if not torch.equal(found["tile_offsets"], tile_offsets_of(stored_levels)):
        raise StateError("tile_offsets are not those of stored_levels")
    exact = _exact_in(found, present)
    most_levels = highest(stored_levels, exact)
    if bool((present.active_levels > most_levels.to(present.active_levels.device)).any()):
        most, least = int(present.active_levels.max()), int(most_levels.min())
        raise StateError(
            f"the state stores some tiles up to {least} bits only, and the map in force reads up to {most}: "
            "apply a map first that reads no more than is stored"
        )
    return replace(
        present,
        planes=tuple(found[f"plane{i}"] for i in range(PLANES)),
        scales=found["scales"],
        gain=found["gain"],
        stored_levels=stored_levels,
        tile_offsets=found["tile_offsets"],
        reach=reach,
        exponent=exponent,
        exact=exact,
    )


def _exact_in(found: Mapping[str, Tensor], present: PlaneTensor) -> ExactTiles | None:
    """The exact tiles of a state, checked; None if it has none."""
    if not set(EXACT) & set(found):
        return None
    if not set(EXACT) <= set(found):
        raise StateError("the state has only some of exact_values and exact_tiles")
    values, tiles = (found[key] for key in EXACT)
    strips, groups = present.grid
    if tiles.dtype != torch.int32 or tiles.dim() != 1 or not are_tiles(tiles, strips * groups):
        raise StateError("exact_tiles of the state are not numbers of tiles in ascending order")
    if values.dtype not in EXACT_TYPES or values.shape != (len(tiles), present.group, TILE_ROWS):
        raise StateError(
            f"exact_values of the state are {values.dtype} {list(values.shape)}, "
            f"not of {len(tiles)} tiles of {present.group} x {TILE_ROWS}"
        )
    if not bool(values.isfinite().all()):
        raise StateError("exact_values of the state hold NaN or Inf")
    return ExactTiles(values, tiles, present.grid)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise StateError(f"{name} of the state is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")


def _same_tiles(one: PlaneTensor, other: PlaneTensor) -> bool:
    """Whether two weights store the same levels of the same tiles."""
    a, b = one.exact, other.exact
    stored = one.stored_levels
    if (a is None) != (b is None) or not torch.equal(stored, other.stored_levels.to(stored.device)):
        return False
    return a is None or b is None or (a.values.dtype == b.values.dtype and torch.equal(a.tiles, b.tiles))


@torch.no_grad()
def taken(present: PlaneTensor, loaded: PlaneTensor) -> PlaneTensor:
    """A copy of the loaded weight. It is written into the present tensors if the stored levels of all tiles are the
    same, else into new ones.
    """
    if _same_tiles(present, loaded):
        for old, new in zip(present.tensors, loaded.tensors, strict=True):
            if old is not new:
                old.copy_(new)
        return replace(present, reach=loaded.reach, exponent=loaded.exponent)
    (moved,) = gathered([loaded])
    gain, stored_levels, tile_offsets = (
        t.clone(memory_format=torch.contiguous_format) for t in (loaded.gain, loaded.stored_levels, loaded.tile_offsets)
    )
    return replace(
        moved, gain=gain, stored_levels=stored_levels, tile_offsets=tile_offsets, active_levels=present.active_levels
    )
