"""Encodings that give backward exactly what it needs of a saved tensor, in fewer bytes than the tensor.

    ReLU          1 bit: whether the gradient passes. Not `x > 0`: torch lets it pass where the result is NaN
    leaky ReLU    1 bit: x > 0, which is false for NaN
    clamp, ReLU6  1 bit: within the bounds or not, decided by the same comparisons as torch's backward
    pooling       no values, only a shape and strides
    masks         1 bit, and the two values (dropout: 0 and 1 / (1 - p))
    integers      the fewest bits that hold their range

Backward need not get the values that were saved: where it only compares, any value that compares alike will do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.activations.forms.encodings import Empty, Encoding, Exact, Masked, narrowed, two_valued
from foveate.activations.forms.rules import Bounds, Need

#: Integers that can be narrowed.
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def lossless(flat: Tensor, need: Need, bounds: Bounds | None, constant: bool, smallest: int) -> tuple[Encoding, Need]:
    """A lossless encoding, and the need that it serves. `Need.VALUES` says that the caller may round the values.

    Args:
        flat: [n], contiguous.
        need: what backward needs.
        bounds: of `Need.INSIDE`.
        constant: whether a float tensor is no function of the parameters: it may be a mask, and is never rounded.
        smallest: tensors of fewer values are kept as they are.
    """
    if need is Need.LEAVE or flat.numel() == 0:
        return Exact(flat), Need.EXACT
    if need is Need.SHAPE and flat.is_floating_point():
        return Empty(flat.numel(), flat.dtype, flat.device), need
    if flat.numel() < smallest:
        return Exact(flat), Need.EXACT
    if not flat.is_floating_point():
        found = two_valued(flat) if flat.dtype == torch.bool else None
        return found or _integers(flat) or Exact(flat), Need.EXACT
    if need in (Need.PASSES, Need.POSITIVE, Need.INSIDE):
        mask = _mask(flat, need, bounds)
        return (mask, need) if mask is not None else (Exact(flat), Need.EXACT)
    if constant:
        return two_valued(flat) or Exact(flat), Need.EXACT
    return Exact(flat), need


def _integers(flat: Tensor) -> Encoding | None:
    return narrowed(flat) if flat.dtype in _INTEGERS else None


def _mask(flat: Tensor, need: Need, bounds: Bounds | None) -> Masked | None:
    if need is Need.POSITIVE:
        return Masked(torch.ops.foveate.mask_pack(flat, 0.0), flat.new_tensor([0, 1]), flat.numel())
    if need is Need.PASSES:
        return _packed(flat <= 0, flat.new_tensor([1, 0]))
    assert bounds is not None
    low, high = bounds.low, bounds.high
    if not bounds.strict:
        inside = torch.ones_like(flat, dtype=torch.bool)
        for bound, holds in ((low, torch.ge), (high, torch.le)):
            if bound is not None:
                inside &= holds(flat, bound)
        value = flat.new_tensor([torch.nan, low if low is not None else high])
        return _packed(inside, value)
    # whether NaN passes differs in torch's kernels between whole vectors and what is left over
    if low is None or high is None or bool(flat.isnan().any()):
        return None
    value = flat.new_tensor([high, low / 2 + high / 2])
    if not bool((value[1] > low) & (value[1] < high)):
        return None
    return _packed((flat > low) & (flat < high), value)


def _packed(mask: Tensor, values: Tensor) -> Masked:
    return Masked(torch.ops.foveate.mask_pack(mask, 0.5), values, mask.numel())
