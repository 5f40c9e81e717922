"""The ops that decide which of its two maps a row of x reads: `plane_error` and `pass_choice`.

Where inputs adapt, a row has a pair of maps (low, high) that differ. For each weight the row reads the higher one where
an estimate of the lower one's error is above a threshold. The error is that of the product, weighted by how much the
loss depends on each output:

    E = sum over sampled rows n of the weight of row_weights[n] * (y_high - y_low)_n^2

Rows are sampled as whole strips of 16, and read at both maps from the layer's own planes. With row_weights that are
half the mean squared gradient of each output over the probability that its strip is drawn, E is an unbiased estimate of
what the lower map adds to the loss (`foveate.precision.adaptation` makes them). Sums are made in one order in float32,
so that what a row reads depends on neither its batch, nor the threads, nor the instruction set. Inputs at 32 bits are
quantized to 16 for the estimate.

`plane_linear_by_handle` decides by itself. Elsewhere `pass_choice` does, and products are given what it chose.

Shapes: M rows of x, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.formats.levels import check_input_level
from foveate.formats.packing import TILE_ROWS
from foveate.kernels.library import LIBRARY, define
from foveate.kernels.planes.generations import choice_of
from foveate.kernels.planes.reference import product_at, weights_of


def plane_error(
    x: Tensor,
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    input_level: Tensor,
    input_range: Tensor | None,
    maps: Sequence[int],
    strips: Tensor,
    row_weights: Tensor,
) -> Tensor:
    """The estimated error of reading map maps[0] instead of map maps[1], for each row of x: float32 [M].

    Args:
        x: [..., K].
        weight, geometry: of one weight, its active levels uint8 [n, NT, G].
        input_level: uint8 [n], the level of the input under each map.
        input_range: float32 [2], the range of the input; None where each row has its own.
        maps: the lower and the higher map.
        strips: int64 [S], the sampled strips of the weight.
        row_weights: float32 [S, 16], the weight of each of their rows.
    """
    (w,) = weights_of(weight, geometry)
    x_MK = x.reshape(-1, x.shape[-1]).float()
    low, high = (product_at(x_MK, w, m, min(16, check_input_level(int(input_level[m]))), input_range) for m in maps)
    errors = x_MK.new_zeros(len(x_MK))
    for strip, weights in zip(strips.tolist(), row_weights, strict=True):
        for row in range(min(TILE_ROWS, w.rows - strip * TILE_ROWS)):
            difference = high[:, strip * TILE_ROWS + row] - low[:, strip * TILE_ROWS + row]
            errors = errors + weights[row] * (difference * difference)
    return errors


def pass_choice(
    book: Tensor, places: Sequence[int], x: Tensor, weight: Sequence[Tensor], geometry: Sequence[int], maps: Tensor
) -> Tensor:
    """The map that each row of x reads of one weight in a pass, uint8 [M, 2], the two of a row the same.

    Args:
        book: of the model.
        places: the numbers of the weight and of its input in their model.
        x: [..., K].
        weight, geometry: of the weight, with the levels of the pass.
        maps: uint8 [M, 2], the maps (low, high) of each row, as `pass_rows` gives them.
    """
    place, input_place = places
    level, limits = torch.ops.foveate.pass_input(book, input_place)
    x_MK = x.reshape(-1, x.shape[-1])
    chosen = maps[:, 1].clone()
    for low, high in maps.unique(dim=0).tolist():
        if low == high:
            continue
        choice = choice_of(book, low, high)
        mine = (maps == maps.new_tensor([low, high])).all(1).nonzero()[:, 0]
        sample = (choice.strips[place], choice.row_weights[place])
        errors = torch.ops.foveate.plane_error(x_MK[mine], weight, geometry, level, limits, [low, high], *sample)
        takes_low = errors <= choice.thresholds[place]
        chosen[mine[takes_low]] = low
        choice.counts[place] += torch.tensor([len(mine), len(mine) - int(takes_low.sum())])
    return chosen[:, None].repeat(1, 2)


define(
    "plane_error(Tensor x, Tensor[] weight, int[] geometry, Tensor input_level, Tensor? input_range, int[] maps,"
    " Tensor strips, Tensor row_weights) -> Tensor",
    plane_error,
)
define(
    "pass_choice(Tensor book, int[] places, Tensor x, Tensor[] weight, int[] geometry, Tensor maps) -> Tensor",
    pass_choice,
)


@torch.library.register_fake("foveate::plane_error", lib=LIBRARY)
def _error_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.register_fake("foveate::pass_choice", lib=LIBRARY)
def _choice_fake(
    book: Tensor, places: Sequence[int], x: Tensor, weight: Sequence[Tensor], geometry: Sequence[int], maps: Tensor
) -> Tensor:
    return maps.new_empty(x.shape[:-1].numel(), 2)
