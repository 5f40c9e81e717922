"""The ops that change the form of what moves. Each reads its input once and writes its output once.

- `plane_to_tiles(rows, plane, group, out)`: a plane from the order of rows to that of tiles.
- `half_extremes(w, group)`: the least and the greatest weight of each group, float32 [2, N, G].
- `halves_to_planes(w, offset, inverse, group, out)`: weights of 16 bits to five planes.
- `upper_halves(codes, level, out)`: codes of 16, 8 or 4 bits to their upper halves.

What they make goes to memory that is there, such as the place of a run: the first write to new memory costs more.
kernels/convert/reference.py has the meaning of each. None is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.formats.packing import check_group
from foveate.kernels.convert import reference as reference
from foveate.kernels.library import LIBRARY, define

_SCHEMAS: dict[str, Callable[..., Any]] = {
    "plane_to_tiles(Tensor rows, int plane, int group, Tensor(a!) out) -> ()": reference.plane_to_tiles,
    "half_extremes(Tensor w, int group) -> Tensor": reference.half_extremes,
    "halves_to_planes(Tensor w, Tensor offset, Tensor inverse, int group, Tensor(a!)[] out) -> ()": (
        reference.halves_to_planes
    ),
    "upper_halves(Tensor codes, int level, Tensor(a!) out) -> ()": reference.upper_halves,
}
for _schema, _meaning in _SCHEMAS.items():
    LIBRARY.impl(define(_schema, _meaning), torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("foveate::plane_to_tiles", lib=LIBRARY)
def _plane_to_tiles_fake(rows: Tensor, plane: int, group: int, out: Tensor) -> None:
    return None


@torch.library.register_fake("foveate::half_extremes", lib=LIBRARY)
def _half_extremes_fake(w: Tensor, group: int) -> Tensor:
    return w.new_empty(2, w.shape[0], w.shape[1] // check_group(group), dtype=torch.float32)


@torch.library.register_fake("foveate::halves_to_planes", lib=LIBRARY)
def _halves_to_planes_fake(w: Tensor, offset: Tensor, inverse: Tensor, group: int, out: list[Tensor]) -> None:
    return None


@torch.library.register_fake("foveate::upper_halves", lib=LIBRARY)
def _upper_halves_fake(codes: Tensor, level: int, out: Tensor) -> None:
    return None
