"""Scales and offsets of groups, in one byte each.

A scale is a small floating-point number: its byte `E << 4 | M` has four bits of exponent E and four of mantissa M. It
is multiplied by 2^e, with one integer `e` for the whole weight. So its value is 2^(E - 15 + e) (1 + M/16), and
2^(e - 14) M/16 where E is 0. These are middle bits of a float16, so a shift and the machine's conversion from float16
decode a scale.

An offset is a whole number of eighths of its group's scale, from -128 to 127. It shifts the grid by up to 16 steps, and
rounding it to eighths costs little, for a grid is as good a little to the side.

Codes are rounded to the grid as it is stored, so rounding the grid adds no error of its own to the weights. Compared
with float16 for both, a weight in groups of 128 takes 0.125 bits less (docs/decisions.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: An offset is a whole number of this part of a scale: one eighth.
OFFSET_PARTS = 8
#: Exponents `e` that a weight may have.
EXPONENTS = range(-64, 33)

_LARGEST_SCALE = 1.9375  # times 2^e
_LEAST_SCALE = 2.0**-18
_DROPPED_BITS = 6  # bits of a float16 below the mantissa of a scale


def exponent_for(largest: float) -> int:
    """The least `e` at which a scale can be as large as `largest`. Beyond the range of `e`, `encoded` clamps scales."""
    if not largest > 0:
        return EXPONENTS[0]
    return min(max(math.ceil(math.log2(largest / _LARGEST_SCALE)), EXPONENTS[0]), EXPONENTS[-1])


def least_scale(exponent: int) -> float:
    """The least scale above 0."""
    return math.ldexp(_LEAST_SCALE, exponent)


def encoded(scale: Tensor, offset: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """The bytes of the nearest scale (uint8) and then of the nearest offset (int8), for floats of one shape."""
    value = (scale.float() * 2.0**-exponent).clamp(0, _LARGEST_SCALE).half().view(torch.int16)
    code = ((value + (1 << _DROPPED_BITS >> 1)) >> _DROPPED_BITS).clamp_(max=255).to(torch.uint8)
    part = decoded_scale(code, exponent) / OFFSET_PARTS
    steps = torch.where(part > 0, offset.float() / part, 0.0).round_().clamp_(-128, 127)
    return code, steps.to(torch.int8)


def decoded_scale(code: Tensor, exponent: int) -> Tensor:
    """The scales of uint8 codes, exact in float32."""
    return (code.to(torch.int16) << _DROPPED_BITS).view(torch.float16).float() * 2.0**exponent


def decoded(scale_code: Tensor, offset_code: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """The scales and offsets of their codes, exact in float32."""
    scale = decoded_scale(scale_code, exponent)
    return scale, offset_code.float() * (scale / OFFSET_PARTS)


def snapped(scale: Tensor, offset: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets as they would be stored, each scale large enough that its offset can be stored; 0 stays 0."""
    reach = offset.abs() * (OFFSET_PARTS / 127)
    wanted = torch.where(scale > 0, scale.clamp_min(least_scale(exponent)), scale)
    code, _ = encoded(wanted, offset, exponent)
    short = (decoded_scale(code, exponent) < reach) & (scale > 0)
    if bool(short.any()):
        up = torch.maximum(encoded(reach, offset, exponent)[0], code)
        up += (decoded_scale(up, exponent) < reach) & (up < 255)
        code = torch.where(short, up, code)
    return decoded(*_with_offset(code, offset, exponent), exponent)


def _with_offset(code: Tensor, offset: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    return code, encoded(decoded_scale(code, exponent), offset, exponent)[1]
