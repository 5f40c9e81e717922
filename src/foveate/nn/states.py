"""What a state_dict holds of a weight on planes, and how it is read back.

Beside the tensors that are stored it holds their form: rows, columns, inputs a group, reach and the exponent of the
scales, without which the same bytes are other weights by powers of two. Nothing is taken from a state before all of the
weight was found to fit; nor, where a whole model is loaded, before all of its weights were.

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
from foveate.formats.packing import SCALE_BYTES, tile_bytes, tile_starts
from foveate.planes import PlaneTensor, gathered

#: The tensors of a weight that a state holds, in the order of `PlaneTensor.tensors`.
STORED = (*(f"plane{i}" for i in range(PLANES)), "scales", "gain", "starts", "resident")
#: int64 [5], see `form_of`.
FORM = "form"


def form_of(planes: PlaneTensor) -> Tensor:
    """Rows, columns, inputs a group, reach and exponent, int64 [5]."""
    return torch.tensor(planes.form, dtype=torch.int64, device="cpu")


def weight_in(state: Mapping[str, Any], prefix: str, present: PlaneTensor) -> PlaneTensor | None:
    """The weight that a state holds under a prefix, in the state's own tensors, to be read at the present levels.

    Returns:
        None where the state does not hold all of a weight.

    Raises:
        StateError: what the state holds does not fit the present weight, or is no weight.
    """
    name = prefix.rstrip(".") or "the weight"
    found = {key: state[prefix + key] for key in (*STORED, FORM) if prefix + key in state}
    if FORM not in found and len(found) == len(STORED):
        raise StateError(
            f"{name}: the state does not say the form of its planes ({prefix}{FORM}), without which weights would be "
            "wrong by powers of two: it is of an older foveate; load that model with it and save it with foveate.save"
        )
    if len(found) <= len(STORED):
        return None
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise StateError(f"{name}: {key} of the state is no tensor that holds values")
    try:
        return _checked({key: value.detach() for key, value in found.items()}, present)
    except StateError as error:
        raise StateError(f"{name}: {error}") from None


def _checked(found: dict[str, Tensor], present: PlaneTensor) -> PlaneTensor:
    form = found[FORM]
    if form.dtype != torch.int64 or form.shape != (len(present.form),):
        raise StateError(f"the form is {form.dtype} {list(form.shape)}, not int64 [{len(present.form)}]")
    rows, columns, group, reach, exponent = form.tolist()
    if (rows, columns, group) != present.form[:3]:
        raise StateError(
            f"size mismatch, the state has {rows} x {columns} in groups of {group}, "
            f"the model {present.rows} x {present.columns} in groups of {present.group}"
        )
    if reach not in REACHES or exponent not in EXPONENTS:
        raise StateError(f"reach (={reach}) is not one of 0, 1, 2, or exponent (={exponent}) not in -64..32")
    resident = found["resident"]
    _check("resident", resident, present.resident.dtype, present.resident.shape)
    if not bool(torch.isin(resident, torch.tensor(WEIGHT_LEVELS, dtype=torch.uint8, device=resident.device)).all()):
        raise StateError("resident has a level that is not one of 0, 2, 3, 4, 6, 8")
    _check("gain", found["gain"], present.gain.dtype, present.gain.shape)
    for i in range(PLANES):
        stored = int((resident >= NESTED_LEVELS[i]).sum())
        _check(f"plane{i}", found[f"plane{i}"], torch.uint8, (stored * tile_bytes(i, group),))
    _check("scales", found["scales"], torch.uint8, (int((resident > 0).sum()) * SCALE_BYTES,))
    _check("starts", found["starts"], torch.int64, present.starts.shape)
    if not torch.equal(found["starts"], tile_starts(resident)):
        raise StateError("starts are not those of resident")
    if bool((present.tags > resident.to(present.tags.device)).any()):
        most, least = int(present.tags.max()), int(resident.min())
        raise StateError(
            f"the state stores some tiles up to {least} bits only, and the map in force reads up to {most}: "
            "apply a map first that reads no more than is stored"
        )
    return replace(
        present,
        planes=tuple(found[f"plane{i}"] for i in range(PLANES)),
        scales=found["scales"],
        gain=found["gain"],
        resident=resident,
        starts=found["starts"],
        reach=reach,
        exponent=exponent,
    )


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise StateError(f"{name} of the state is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")


@torch.no_grad()
def taken(present: PlaneTensor, loaded: PlaneTensor) -> PlaneTensor:
    """A copy of what was loaded: in the present tensors where as much is stored of each tile, else in new ones."""
    if torch.equal(present.resident, loaded.resident.to(present.resident.device)):
        for old, new in zip(present.tensors, loaded.tensors, strict=True):
            if old is not new:
                old.copy_(new)
        return replace(present, reach=loaded.reach, exponent=loaded.exponent)
    (moved,) = gathered([loaded])
    gain, resident, starts = (
        t.clone(memory_format=torch.contiguous_format) for t in (loaded.gain, loaded.resident, loaded.starts)
    )
    return replace(moved, gain=gain, resident=resident, starts=starts, tags=present.tags)
