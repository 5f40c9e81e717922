"""Encodings: how the values of one saved tensor are stored, and given back.

    Exact        the tensor itself, or a copy of the part that is needed
    Grouped      2, 4, 8 or 16 bits per value, with a minimum and a step for each group (stochastic rounding)
    Masked       one bit per value: signs, dropout masks, any tensor of two values
    Narrow       integers in the fewest bits that hold their range
    Empty        a length and no values: the input of pooling
    Recomputed   no values: a function of other stored tensors, computed when backward asks for it

Exact, Masked and Narrow give back what they were given, bit for bit. An encoding knows a flat run of values; shapes and
strides are in `saved_tensors.py`. The stored form of Grouped is in docs/format.md, "Saved tensors".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

GROUPED_LEVELS: tuple[int, ...] = (2, 4, 8, 16)
_WIDTHS = (1, 2, 4, 8, 16, 32)


class Encoding(Protocol):
    """A flat run of values, stored in some way."""

    @property
    def bytes(self) -> int:
        """Bytes held."""

    @property
    def level(self) -> int:
        """Bits per value, scales not counted; 0 where nothing is held."""

    def values(self) -> Tensor:
        """The values, [n]."""


@dataclass(frozen=True)
class Exact:
    """The values themselves."""

    flat: Tensor

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return self.flat.numel() * self.flat.element_size()

    @property
    def level(self) -> int:
        """Bits per value."""
        return 8 * self.flat.element_size()

    def values(self) -> Tensor:
        """The values, [n]."""
        return self.flat


@dataclass(frozen=True)
class Grouped:
    """Codes of `level` bits, and the minimum and step of each group (docs/format.md, "Saved tensors")."""

    codes: Tensor
    ranges: Tensor
    level: int
    group: int
    length: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return self.codes.numel() + 2 * self.ranges.numel()

    def values(self) -> Tensor:
        """The values, [n]."""
        unpacked: Tensor = torch.ops.foveate.group_unpack(
            self.codes, self.ranges, self.level, self.group, self.length, self.dtype
        )
        return unpacked


@dataclass(frozen=True)
class Masked:
    """One bit per value, and the two values that the bits stand for."""

    bits: Tensor
    two: Tensor
    length: int

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return self.bits.numel() + self.two.numel() * self.two.element_size()

    @property
    def level(self) -> int:
        """Bits per value."""
        return 1

    def values(self) -> Tensor:
        """The values, [n]."""
        unpacked: Tensor = torch.ops.foveate.mask_unpack(self.bits, self.two, self.length)
        return unpacked


@dataclass(frozen=True)
class Narrow:
    """Integers low .. low + 2^level - 1."""

    codes: Tensor
    level: int
    low: int
    length: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return self.codes.numel()

    def values(self) -> Tensor:
        """The values, [n]."""
        unpacked: Tensor = torch.ops.foveate.narrow_unpack(self.codes, self.level, self.low, self.length, self.dtype)
        return unpacked


class Nothing:
    """Encodings that store no values."""

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return 0

    @property
    def level(self) -> int:
        """Bits per value."""
        return 0


class Recomputed(Nothing, ABC):
    """Encodings whose values are computed from other payloads when backward asks for them."""

    @property
    @abstractmethod
    def roots(self) -> tuple[Any, ...]:
        """The payloads that they are computed from."""


@dataclass(frozen=True)
class Empty(Nothing):
    """No values. Backward gets memory of the right size, and never reads it."""

    length: int
    dtype: torch.dtype
    device: torch.device

    def values(self) -> Tensor:
        """The values, [n]."""
        return torch.empty(self.length, dtype=self.dtype, device=self.device)


def grouped(flat: Tensor, level: int, group: int, seed: int | None) -> Grouped | None:
    """A float run at `level` bits by stochastic rounding; None if a value is NaN or infinite (keep it exact).

    Args:
        flat: [n], contiguous; float32, bfloat16 or float16.
        level: 2, 4, 8 or 16.
        group: values per group.
        seed: of the private generator; None rounds to nearest.
    """
    codes, ranges = torch.ops.foveate.group_pack(flat, level, group, seed)
    if torch.isnan(ranges).any():
        return None
    return Grouped(codes, ranges, level, group, flat.numel(), flat.dtype)


def two_valued(flat: Tensor) -> Masked | None:
    """A run as bits, if it holds at most two values. The search stops at the third value."""
    bits, two = torch.ops.foveate.two_values_pack(flat)
    return Masked(bits, two, flat.numel()) if two.numel() else None


def narrowed(flat: Tensor) -> Narrow | None:
    """Integers in the fewest bits that hold their range; None where that saves nothing."""
    low, high = (int(v) for v in torch.aminmax(flat))
    level = next((width for width in _WIDTHS if high - low < 1 << width), 64)
    if level >= 8 * flat.element_size():
        return None
    codes = torch.ops.foveate.narrow_pack(flat, level, low)
    return Narrow(codes, level, low, flat.numel(), flat.dtype)
