"""The error of a weight's gradient that rounding a saved input makes, in closed form.

A linear layer's weight gradient is dW = sum_n g_n x_n^T. Where each x is rounded independently and without bias, and g
does not depend on the rounded x,

    E ||err dW||^2 = sum_n ||g_n||^2 sum_k Var[x_nk]

exactly (ActNN, Chen et al. 2021, eq. 7, without its bound on the variance). For a convolution the sum runs over
patches: a value of the input is multiplied by the gradient of every output pixel whose patch contains it.

Shapes: N rows, K inputs, M outputs; L levels; Q groups of values, as `group_variance` counts them; B images,
    C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def row_sums(variance_LQ: Tensor, group: int, rows: int, columns: int) -> Tensor:
    """Sums of variances over rows of `columns` values, [L, N]. A group that straddles rows is divided evenly."""
    total_LQ = torch.cat([variance_LQ.new_zeros(len(variance_LQ), 1), variance_LQ.double().cumsum(1)], 1)
    ends = torch.arange(rows + 1, dtype=torch.float64) * (columns / group)
    below = ends.floor().clamp_max(variance_LQ.shape[1] - 1).long()
    last = rows * columns - (variance_LQ.shape[1] - 1) * group  # values of the last group, which may be padded
    width = torch.full_like(ends, float(group))
    width[below == variance_LQ.shape[1] - 1] = float(last)
    share = ((ends - below) * group / width).clamp_max(1.0)
    at_LE = total_LQ[:, below] + share * (total_LQ[:, below + 1] - total_LQ[:, below])
    return (at_LE[:, 1:] - at_LE[:, :-1]).float()


def linear_error(variance_LQ: Tensor, group: int, gradient_NM: Tensor, columns: int) -> Tensor:
    """E ||err dW||^2 of a linear layer at each level, [L] float64."""
    energy_N = gradient_NM.detach().reshape(-1, gradient_NM.shape[-1]).float().square().sum(-1)
    rows_LN = row_sums(variance_LQ, group, energy_N.numel(), columns)
    return rows_LN.double() @ energy_N.double()


def conv_error(
    variance_LQ: Tensor,
    group: int,
    gradient: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    kernel: Sequence[int],
    options: Mapping[str, Any],
) -> Tensor:
    """E ||err dW||^2 of a convolution at each level, [L] float64.

    Args:
        variance_LQ: variances by group of the input's memory.
        group: values per group.
        gradient: of the output, [B, M, *].
        shape, stride: of the input, [B, C, *].
        kernel: the sizes of the window.
        options: `stride`, `padding`, `dilation` and `groups` of the convolution.
    """
    groups, space = options["groups"], len(kernel)
    if gradient.dim() == space + 1:  # one image without a batch: its input was saved with one
        gradient = gradient.unsqueeze(0)
    energy = gradient.detach().float().square().unflatten(1, (groups, -1)).sum(2)
    transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[space - 1]
    ones = energy.new_ones(groups, 1, *kernel)
    spread = transpose(energy, ones, None, options["stride"], 0, 0, groups, options["dilation"])
    # windows reach beyond the image into padding, which has no error
    padding = options["padding"]
    if isinstance(padding, str):
        wide = [d * (k - 1) if padding == "same" else 0 for d, k in zip(options["dilation"], kernel, strict=True)]
        padding = [w // 2 for w in wide]
    met = spread.new_zeros(shape[0], groups, *shape[2:])
    pieces: list[tuple[slice, slice]] = [
        (slice(p, p + size), slice(0, size))
        for p, n, s in zip(padding, shape[2:], spread.shape[2:], strict=True)
        for size in (max(min(n, s - p), 0),)  # 0 where no window reaches beyond the padding
    ]
    inside: Any = (..., *(of for of, _ in pieces))
    reached: Any = (..., *(to for _, to in pieces))
    met[reached] = spread[inside]
    met_of_value = met.repeat_interleave(shape[1] // groups, 1)
    length = met_of_value.numel()
    weight = torch.empty_strided(tuple(shape), tuple(stride), dtype=torch.float32)
    weight.copy_(met_of_value)
    flat = F.pad(weight.as_strided((length,), (1,)), (0, variance_LQ.shape[1] * group - length))
    counts = torch.full((variance_LQ.shape[1],), float(group), dtype=torch.float64)
    counts[-1] = length - (len(counts) - 1) * group
    return variance_LQ.double() @ (flat.view(-1, group).double().sum(1) / counts)


def conv_options(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The window of a call of a convolution, and its stride, padding, dilation and groups."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    kernel = tuple(given["weight"].shape[2:])
    options: dict[str, Any] = {"groups": given.get("groups", 1), "padding": given.get("padding", 0)}
    options |= {name: given.get(name, 1) for name in ("stride", "dilation")}
    for name in ("stride", "dilation", "padding"):
        if isinstance(options[name], int):
            options[name] = (options[name],) * len(kernel)
        elif len(options[name]) == 1:
            options[name] = tuple(options[name]) * len(kernel)
    return kernel, options
