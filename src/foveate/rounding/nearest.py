"""Round every weight to the nearest code, on grids that are chosen for all levels at once.

Scale and offset of each group are searched by an op, whose reference has the cost that they minimize
(`foveate.kernels.rounding.grid_search`). It weighs errors of clipping at 6 and at 8 bits by clip penalties. Nearest
codes do nothing else about the error at 8 bits, so that penalty is high for them; where other codes compensate an
error (`foveate.rounding.descent`) more may be clipped. docs/decisions.md has the measurements.

With the codes fixed, each row has a gain at 2 and at 3 bits that restores the energy of its weights:
`gain^2 sum A (w^ - m)^2 = sum A (w - m)^2`, with `w^` before the gain. Least squares would shrink the row. That has
less squared error but makes a worse model, since the rows of all layers shrink together. From 4 bits up the gain is 1:
there is little to restore, and a gain would move the most important weights off the grid that was chosen for them.

Legend: N rows and K inputs of a weight; n rows of a chunk; g inputs a group, G groups a row, R = n * G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import DataError, WeightError
from foveate.formats.grids import exponent_for
from foveate.formats.levels import GAINED_LEVELS, code_range, code_step
from foveate.formats.packing import check_group
from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.rounding.grid_search import in_groups, inverse

# Inputs from which each row has gains of its own.
_ROW_GAINS_FROM = 1024

#: What a squared error costs at 6 and at 8 bits, where it costs 1 at 4 bits: for nearest codes, and for grids on which
#: descent chooses other codes.
CLIP_PENALTIES = (4.0, 96.0)
CLIP_PENALTIES_FOR_DESCENT = (2.0, 8.0)

#: The largest magnitude of a weight. Scales can hold far more, and products with inputs stay within float32.
_LARGEST = 65504.0

# How many values a chunk of rows has: its temporaries stay in the caches.
_CHUNK = 1 << 18
# The least importance of an input, in means: no calibration proves that an input is always zero.
_LEAST_IMPORTANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Rounded:
    """The codes of a weight before they are packed into planes; docs/format.md says what they mean.

    Attributes:
        anchor: uint8 [N, K], the 4-bit codes.
        residual: uint8 [N, K], the 4 bits below them.
        scale: float32 [N, G], one step of the 4-bit codes, as a byte can hold it (`formats.grids`).
        offset: float32 [N, G], the centre of the grid, likewise.
        gain: float16 [2, N] near 1, for levels 2 and 3; [2, 1] for a narrow weight, where 4 bytes
            for each row are too much.
        group: inputs a group.
        reach: how far the residual widens; 0 for nearest codes.
    """

    anchor: Tensor
    residual: Tensor
    scale: Tensor
    offset: Tensor
    gain: Tensor
    group: int
    reach: int = 0


def round_weight(
    w_NK: Tensor,
    *,
    group: int,
    input_energy_K: Tensor | None = None,
    clip_penalties: tuple[float, float] = CLIP_PENALTIES,
) -> Rounded:
    """Round a weight to the nearest codes, on grids searched for all levels.

    The same weight gives the same codes. Beyond the result, memory is a few times a chunk of 2^18 values.

    Args:
        w_NK: floating point [N, K].
        group: inputs a group, 32, 64 or 128; K need not divide.
        input_energy_K: [K], the mean square of each input, in any unit; all equal if not given.
        clip_penalties: what a squared error costs at 6 and at 8 bits.

    Raises:
        WeightError: a weight that is not a matrix of finite floating point in the range of float16.
        DataError: energies that are not K finite values, none of them negative.
    """
    check_group(group)
    w_NK = w_NK.detach()
    _check_weight(w_NK)
    rows, columns = w_NK.shape
    importance_K = importance_of(input_energy_K, w_NK)
    groups = -(-columns // group)
    ensure_loaded()
    codes = w_NK.new_empty(2, rows, columns, dtype=torch.uint8)
    grids = w_NK.new_empty(2, rows, groups, dtype=torch.float32)
    # no grid is wider than this: reaching twice as far as the weights costs more than clipping
    exponent = exponent_for(2 * float(w_NK.abs().max()) / 7.5)
    gain_2N = w_NK.new_empty(len(GAINED_LEVELS), rows, dtype=torch.float16)
    chunk = max(1, _CHUNK // (groups * group))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        outcome = codes[:, part], grids[:, part], gain_2N[:, part]
        _round_rows(w_NK[part].float(), importance_K, group, exponent, clip_penalties, *outcome)
    return Rounded(codes[0], codes[1], grids[0], grids[1], _one_if_narrow(gain_2N, columns), group)


def restoring_gains(w_NK: Tensor, anchor_NK: Tensor, rounded: Rounded, input_energy_K: Tensor) -> Tensor:
    """The gains for other codes on the same grids, float16 [2, N] or [2, 1] as in `Rounded`.

    Args:
        w_NK: the weight, floating point [N, K].
        anchor_NK: the 4-bit codes.
        rounded: the weight whose grids the codes are on.
        input_energy_K: as `round_weight` takes it.
    """
    rows, columns = w_NK.shape
    importance_K = importance_of(input_energy_K, w_NK)
    gain_2N = w_NK.new_empty(len(GAINED_LEVELS), rows, dtype=torch.float16)
    chunk = max(1, _CHUNK // columns)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        w_gR, importance_gR = in_groups(w_NK[part].float(), importance_K, rounded.group)
        anchor_gR, _ = in_groups(anchor_NK[part].float(), importance_K, rounded.group)
        scale_R, offset_R = (t[part].float().view(-1) for t in (rounded.scale, rounded.offset))
        gain_2N[:, part] = _gains(w_gR - offset_R, anchor_gR, scale_R, importance_gR, len(w_NK[part]))
    return _one_if_narrow(gain_2N, columns)


def _one_if_narrow(gain_2N: Tensor, columns: int) -> Tensor:
    return gain_2N if columns >= _ROW_GAINS_FROM else gain_2N.float().square().mean(1, keepdim=True).sqrt().half()


def _check_weight(w_NK: Tensor) -> None:
    if w_NK.ndim != 2 or not w_NK.is_floating_point() or not w_NK.numel():
        raise WeightError(f"weight (={w_NK.dtype}, shape {tuple(w_NK.shape)}) is not a matrix of floating point values")
    lowest, highest = torch.aminmax(w_NK)
    largest = float(torch.maximum(-lowest, highest))
    if not largest < float("inf"):  # NaN fails too
        raise WeightError("weight has NaN or Inf: every value must be finite")
    if largest > _LARGEST:
        raise WeightError(f"weight (largest magnitude {largest:g}) is beyond {_LARGEST:g}, the range of float16")


def importance_of(energy_K: Tensor | None, w_NK: Tensor) -> Tensor:
    """The importance of each input, float32 [K], 1 in the mean and never zero."""
    columns = w_NK.shape[1]
    alike_K = torch.ones(columns, dtype=torch.float32, device=w_NK.device)
    if energy_K is None:
        return alike_K
    if energy_K.shape != (columns,):
        raise DataError(f"input_energy_K (shape {tuple(energy_K.shape)}) is not one value an input, {columns}")
    energy_K = energy_K.detach().to(w_NK.device, torch.float64)
    if not bool(((energy_K >= 0) & energy_K.isfinite()).all()):
        raise DataError("input_energy_K has NaN, Inf or negative values: an energy is a mean of squares")
    mean = energy_K.mean()
    if not float(mean):
        return alike_K
    return (energy_K / mean).clamp_min(_LEAST_IMPORTANCE).float()


def _round_rows(
    w_nK: Tensor,
    importance_K: Tensor,
    group: int,
    exponent: int,
    clip_penalties: tuple[float, float],
    codes: Tensor,
    grids: Tensor,
    gain_2n: Tensor,
) -> None:
    """Write codes [2, n, K], grids [2, n, G] and gains of a chunk of rows."""
    rows, columns = w_nK.shape
    grids.copy_(torch.ops.foveate.search_grids(w_nK.contiguous(), importance_K, group, exponent, *clip_penalties))
    scale_R, offset_R = grids.flatten(1)
    w_gR, importance_gR = in_groups(w_nK, importance_K, group)
    from_offset_gR = w_gR - offset_R
    u_gR = from_offset_gR * inverse(scale_R) + 8.0
    anchor_gR = u_gR.floor().clamp_(0, 15)
    residual_gR = u_gR.sub_(anchor_gR).mul_(16.0).floor_().clamp_(0, 15)
    for i, code_gR in enumerate((anchor_gR, residual_gR)):
        codes[i] = code_gR.t().reshape(rows, -1)[:, :columns]
    gain_2n.copy_(_gains(from_offset_gR, anchor_gR, scale_R, importance_gR, rows))


def _gains(from_offset_gR: Tensor, anchor_gR: Tensor, scale_R: Tensor, importance_gR: Tensor, rows: int) -> Tensor:
    """Gains [2, n] that restore each row's energy at 2 and 3 bits; 1 for a row that has none."""

    def energy(t_gR: Tensor) -> Tensor:
        return t_gR.square().mul_(importance_gR).sum(0).view(rows, -1).sum(1)

    wanted_n = energy(from_offset_gR)
    gain_2n = torch.ones(len(GAINED_LEVELS), rows, device=scale_R.device)
    for i, level in enumerate(GAINED_LEVELS):
        centred_gR = (anchor_gR * 2.0 ** (level - 4)).floor_().sub_(code_range(level, 0) / 2)
        ratio_n = wanted_n / energy(centred_gR.mul_(scale_R * code_step(level, 0)))
        gain_2n[i] = torch.where(ratio_n.isfinite() & (ratio_n > 0), ratio_n.sqrt(), 1.0).clamp_(0.5, 2.0)
    return gain_2n
