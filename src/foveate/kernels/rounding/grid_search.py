"""The meaning of `search_grids`, in plain torch: each group's scale and offset of least cost over all levels.

A group has one scale `s` and offset `m`, and five levels read it, so no level has the grid that is best for it alone.
The best grid for 4 bits clips large weights, and at 8 bits most of the error would be that of clipping. So a grid is
judged by its cost over all levels: the squared error of each level in units of its own step, weighted by the importance
of each input.

    cost = s^2 sum_j A_j (d2_j^2 + d3_j^2 + d4_j^2 + (p6 + p8) x_j^2 + (p6 / 16 + p8 / 256) / 12)

`d` is the error in steps of 2, 3 and 4 bits. `x` is how far the weight lies beyond the outermost 4-bit cell, in 4-bit
steps. That part of the error is left at 6 and 8 bits, and `p6` and `p8` are the clip penalties for it. The last term is
the rest of the error of these levels, which is uniform rounding.

The search scans clips, the same at both ends, and then moves the ends one by one with halving steps. Last it refits `s`
and `m` to the 4-bit codes by weighted least squares. (The imatrix quantizers of llama.cpp scan and refit in the same
way, for one level.) Sums go through a group in the order of its inputs, so that all implementations round alike.

Legend: N rows and K inputs of a weight; g inputs a group, G groups a row, R = N * G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from foveate.formats.grids import least_scale, snapped

# How far each end of the grid reaches: 1 puts the outermost 4-bit codes on the farthest weight.
_SCAN = (1.0, 0.93, 0.86, 0.78, 0.7, 0.6, 0.48)
_STEPS = (0.12, 0.06, 0.03, 0.015)
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1))


def search_grids(
    w_NK: Tensor, importance_K: Tensor, group: int, exponent: int, penalty6: float, penalty8: float
) -> Tensor:
    """The grids of all groups as the stored form can hold them, float32 [2, N, G]: scales, offsets.

    Args:
        w_NK: float32, finite.
        importance_K: float32, none negative.
        group: inputs a group.
        exponent: of the weight's scales (`formats.grids`).
        penalty6, penalty8: what a squared error of clipping costs at 6 and at 8 bits.
    """
    w_gR, importance_gR = in_groups(w_NK, importance_K, group)
    noise_R = in_order(importance_gR) * ((penalty6 / 4**2 + penalty8 / 4**4) / 12)
    cost = partial(_cost, w_gR, importance_gR, penalty6 + penalty8, noise_R)
    found = search(w_gR, importance_gR, cost, partial(snapped, exponent=exponent), least_scale(exponent))
    return torch.stack(found).view(2, len(w_NK), -(-w_NK.shape[1] // group))


def in_groups(t_NK: Tensor, importance_K: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(weights with each group as a column, [g, R], so that rows are long and vectorize; the importance likewise).

    Padding repeats a weight, and its importance is 0.
    """
    missing = -t_NK.shape[1] % group
    t_gR = functional.pad(t_NK, (0, missing), mode="replicate").view(-1, group).t().contiguous()
    return t_gR, functional.pad(importance_K, (0, missing)).view(-1, group).t().repeat(1, len(t_NK))


def in_order(t_gR: Tensor) -> Tensor:
    """The sums over each group, [R], its elements added one after another."""
    total_R = t_gR[0].clone()
    for t_R in t_gR[1:]:
        total_R += t_R
    return total_R


def inverse(scale_R: Tensor) -> Tensor:
    """1 / scale, and 0 for a group without spread."""
    return torch.where(scale_R > 0, 1.0 / scale_R, 0.0)


def _cost(
    w_gR: Tensor, importance_gR: Tensor, clip: float, noise_R: Tensor, scale_R: Tensor, offset_R: Tensor
) -> Tensor:
    """The cost of each group's grid over the levels, [R]: the formula at the head of the file."""
    v_gR = (w_gR - offset_R).mul_(inverse(scale_R)).sub_(0.5)  # integers are the middles of 4-bit cells
    error_gR = v_gR - v_gR.clamp(-8, 7).round_()
    cost_gR = functional.softshrink(error_gR, 0.5).square_().mul_(clip)
    cost_gR += error_gR.square_()
    for half in (4, 2):
        v_gR.mul_(0.5).sub_(0.25)  # of 3-bit cells, then of 2-bit cells
        error_gR = v_gR - v_gR.clamp(-half, half - 1).round_()
        cost_gR += error_gR.square_()
    return (in_order(cost_gR.mul_(importance_gR)) + noise_R) * scale_R.square()


def search(
    w_gR: Tensor,
    importance_gR: Tensor,
    cost: Callable[[Tensor, Tensor], Tensor],
    stored: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    least: float,
    level: int = 4,
) -> tuple[Tensor, Tensor]:
    """Each group's scale and offset of least cost, [R] each, float32.

    Args:
        w_gR, importance_gR: weights, and their importance.
        cost: the cost [R] of each group's scale and offset.
        stored: scales and offsets [R] rounded to what the stored form can hold.
        least: the least scale that the stored form can hold.
        level: the bits of the codes that a scale is a step of.
    """
    lowest_R, highest_R = torch.aminmax(w_gR, dim=0)
    centre_R = lowest_R * 0.5 + highest_R * 0.5
    half_R = highest_R * 0.5 - lowest_R * 0.5
    is_nothing_R = torch.maximum(highest_R, -lowest_R) <= least / 2
    scale_R, offset_R = torch.zeros_like(centre_R), torch.zeros_like(centre_R)
    low_R, high_R = torch.ones_like(centre_R), torch.ones_like(centre_R)
    least_R = torch.full_like(centre_R, torch.inf)

    def improves(step_R: Tensor, middle_R: Tensor) -> Tensor:
        """Take these grids where they cost less; whether they do, bool [R]."""
        nonlocal least_R, scale_R, offset_R
        step_R = torch.where(is_nothing_R, 0.0, step_R.clamp_min(least))
        step_R, middle_R = stored(step_R, torch.where(is_nothing_R, 0.0, middle_R))
        cost_R = cost(step_R, middle_R)
        better_R = cost_R < least_R
        least_R = torch.where(better_R, cost_R, least_R)
        scale_R = torch.where(better_R, step_R, scale_R)
        offset_R = torch.where(better_R, middle_R, offset_R)
        return better_R

    def move_ends(lower_R: Tensor, upper_R: Tensor) -> None:
        nonlocal low_R, high_R
        better_R = improves(half_R * (lower_R + upper_R) / (2**level - 1), centre_R + half_R * (upper_R - lower_R) / 2)
        low_R = torch.where(better_R, lower_R, low_R)
        high_R = torch.where(better_R, upper_R, high_R)

    for clip in _SCAN:
        end_R = torch.full_like(centre_R, clip)
        move_ends(end_R, end_R)
    for step in _STEPS:
        for down, up in _DIRECTIONS:
            move_ends(low_R + step * down, high_R + step * up)
    improves(*_refit(w_gR, importance_gR, scale_R, offset_R, 2 ** (level - 1)))
    return scale_R, offset_R


def _refit(w_gR: Tensor, importance_gR: Tensor, scale_R: Tensor, offset_R: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Scale and offset by weighted least squares to the 2 * half codes of a grid, [R] each."""
    from_offset_gR = w_gR - offset_R
    code_gR = (from_offset_gR * inverse(scale_R)).sub_(0.5).clamp_(-half, half - 1).round_().add_(0.5)
    total_R = in_order(importance_gR)
    mean_code_R = in_order(importance_gR * code_gR) / total_R
    mean_R = in_order(importance_gR * from_offset_gR) / total_R
    code_gR -= mean_code_R
    weight_gR = importance_gR * code_gR
    slope_R = in_order(weight_gR * from_offset_gR) / in_order(weight_gR * code_gR)
    step_R = torch.where(slope_R.isfinite() & (slope_R > 0), slope_R, scale_R).minimum(2 * scale_R)
    return step_R, offset_R + mean_R - step_R * mean_code_R
