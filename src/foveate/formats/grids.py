"""Scales and offsets of groups in a byte each.

A scale is a small float of four bits of exponent and four of mantissa, `E << 4 | M`, times 2^e, where `e` is one number
a weight: 2^(E - 15 + e) (1 + M/16), or 2^(e - 14) M/16 where E is 0. It is half of a float16 that is cut at both ends,
so that a shift and the machine's own conversion decode it. An offset is a whole number of eighths of its group's scale,
-128 to 127: a grid is as good a little to the side, and reaches 16 steps from zero.

Codes are chosen for the grid as it is stored, so what the bytes cannot say is not an error of the weights. Against
float16 for both, a weight in groups of 128 takes an eighth of a bit less (docs/decisions.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Parts of a scale that an offset counts in.
OFFSET_PARTS = 8
#: Exponents `e` that a weight may have.
EXPONENTS = range(-64, 33)

_LARGEST_SCALE = 1.9375  # times 2^e
_LEAST_SCALE = 2.0**-18
_DROPPED_BITS = 6  # of a float16, below a scale's mantissa


def exponent_for(largest: float) -> int:
    """The least `e` whose scales reach a value; raises nothing: what is out of range is clamped by `encoded`."""
    if not largest > 0:
        return EXPONENTS[0]
    return min(max(math.ceil(math.log2(largest / _LARGEST_SCALE)), EXPONENTS[0]), EXPONENTS[-1])


def least_scale(exponent: int) -> float:
    """The least scale above 0."""
    return math.ldexp(_LEAST_SCALE, exponent)


def encoded(scale: Tensor, offset: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """The nearest scale and then the nearest offset, uint8 and int8, of floats of any one shape."""
    value = (scale.float() * 2.0**-exponent).clamp(0, _LARGEST_SCALE).half().view(torch.int16)
    code = ((value + (1 << _DROPPED_BITS >> 1)) >> _DROPPED_BITS).clamp_(max=255).to(torch.uint8)
    part = decoded_scale(code, exponent) / OFFSET_PARTS
    steps = torch.where(part > 0, offset.float() / part, 0.0).round_().clamp_(-128, 127)
    return code, steps.to(torch.int8)


def decoded_scale(code: Tensor, exponent: int) -> Tensor:
    """float32 of the uint8 codes of scales, exact."""
    return (code.to(torch.int16) << _DROPPED_BITS).view(torch.float16).float() * 2.0**exponent


def decoded(scale_code: Tensor, offset_code: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets, float32 and exact."""
    scale = decoded_scale(scale_code, exponent)
    return scale, offset_code.float() * (scale / OFFSET_PARTS)


def snapped(scale: Tensor, offset: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets as they would be stored, with a scale that its offset can be reached by; 0 stays 0."""
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
