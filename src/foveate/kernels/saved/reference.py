"""The meaning of the ops on what autograd saves (`ops/saved.py`), in plain torch.

A tensor is read flat, in the order of its memory, and cut into groups of `g` elements. A group has a `low` and a
`step`, both bfloat16, which span from its minimum to its maximum in `B = 2^bits - 1` steps; `code * step` is
exact in float32, so a value decodes with one rounding, on every machine alike.

Codes are made in fixed point, with 8 bits of fraction:

    T    = round_half_even((x - low) * (256 / step))       the quotient rounded down, so that T is at most 256 B
    code = (T + r) >> 8                                    r: 128, or uniform on 0 .. 255

so with a uniform r the mean of a code is T / 256 and its variance f (1 - f), f = (T mod 256) / 256, both exactly; T
itself is within half a unit, a 512th of a step. r comes from a hash of the seed and the element's place (`uniform`): no
state, no order, any number of threads.

Shapes: n elements, g elements a group, G = ceil(n / g) groups. Source of the quantizer: ActNN, Chen et al., 2021,
https://arxiv.org/abs/2104.14129 .
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_BITS = (2, 4, 8, 16)
NARROW_BITS = (1, 2, 4, 8, 16, 32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
GROUP_UNIT, GROUP_MOST = 32, 1024
#: What 1 is in fixed point.
ONE = 256
#: The smallest step that is not zero: ONE / step stays a finite float32.
LEAST_STEP = 2.0**-108
#: Elements that share two 32-bit keys of the generator.
PAGE = 1 << 21
_WORD = (1 << 32) - 1
_LONG = (1 << 64) - 1
_UPPER_HALF = -65536
_BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _check(holds: bool, says: str) -> None:
    """What the compiled kernels say of the same arguments."""
    if not holds:
        raise RuntimeError(says)


def check_group(bits: Sequence[int], group: int) -> None:
    """Raise `RuntimeError` unless groups of this size can have these bits."""
    for each in bits:
        _check(each in GROUP_BITS, f"bits (={each}) is not one of 2, 4, 8, 16")
    fits = GROUP_UNIT <= group <= GROUP_MOST and group % GROUP_UNIT == 0
    _check(fits, f"group (={group}) is not a multiple of {GROUP_UNIT} from {GROUP_UNIT} to {GROUP_MOST}")


def _check_floats(x: Tensor) -> None:
    _check(x.dtype in FLOATS, f"x has dtype (={x.dtype}), not float32, bfloat16 or float16")


def in_memory_order(x: Tensor) -> Tensor:
    """The elements of x [n] as they lie in memory, without a copy.

    Raises:
        RuntimeError: x has gaps or overlaps.
    """
    expected = 1
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(x.dim()) if x.shape[d] != 1):
        dense = stride == expected or not x.numel()
        _check(dense, f"x of shape {list(x.shape)} and strides {list(x.stride())} has gaps or overlaps in memory")
        expected *= size
    return x.detach().as_strided((x.numel(),), (1,))


def uniform(seed: int, n: int) -> Tensor:
    """The generator: int64 [n], uniform on 0..255, of the seed (64 bits) and the element's place only.

    Four elements share a 32-bit hash, the first of them its lowest byte. The hash is of a counter, with two keys that
    each 2^21 elements have for themselves from `splitmix64`; its constants are those of lowbias32,
    https://nullprogram.com/blog/2018/07/31/ .
    """
    place = torch.arange(n)
    keys = torch.tensor([_keys(seed, page) for page in range(-(-n // PAGE))], dtype=torch.int64).view(-1, 2)
    first, second = keys[place // PAGE].unbind(1)
    h = (place % PAGE // 4 + first) & _WORD
    h = (h ^ (h >> 16)) * 0x7FEB352D & _WORD
    h = ((h ^ (h >> 15)) + second & _WORD) * 0x846CA68B & _WORD
    h = h ^ (h >> 16)
    return h >> 8 * (place % 4) & 0xFF


def _keys(seed: int, page: int) -> tuple[int, int]:
    z = (seed + (page + 1) * 0x9E3779B97F4A7C15) & _LONG
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _LONG
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _LONG
    z ^= z >> 31
    return z & _WORD, z >> 32


def _grouped(flat: Tensor, group: int) -> Tensor:
    """float32 [G, g]; the last group is filled up with its last element."""
    missing = -len(flat) % group
    return torch.cat([flat, flat[-1:].expand(missing)]).view(-1, group).float()


def _ranges(x_Gg: Tensor, bits: int, limit: float) -> tuple[Tensor, Tensor]:
    """low and step, float32 [G, 1] that bfloat16 holds; NaN and 0 for a group that is not finite, or whose range is not
    within -limit..limit.
    """
    minimum, maximum = x_Gg.amin(1, keepdim=True) + 0.0, x_Gg.amax(1, keepdim=True)
    word = minimum.view(torch.int32)
    cut = word & _UPPER_HALF
    low = torch.where((minimum < 0) & (word != cut), cut + 0x10000, cut).view(torch.float32)
    steps = torch.full_like(low, 2**bits - 1)
    span = maximum - low
    quotient = span / steps
    up = (quotient.view(torch.int32) + 0xFFFF & _UPPER_HALF).view(torch.float32).clamp_min(LEAST_STEP)
    short = (steps * up < span) | (low + steps * up < maximum)
    step = torch.where(short, up.view(torch.int32) + 0x10000, up.view(torch.int32)).view(torch.float32)
    step = torch.where(maximum > low, step, 0.0)
    usable = x_Gg.isfinite().all(1, keepdim=True) & (low >= -limit) & (low + steps * step <= limit)
    return torch.where(usable, low, torch.nan), torch.where(usable, step, 0.0)


def _fixed_point(x_Gg: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """T, int64 [G, g]; 0 where the range is not finite."""
    nearest = torch.full_like(step, ONE) / step
    above = nearest.double() * step.double() > ONE  # rounded down, no code can be beyond the last one
    scale = torch.where(above, nearest.view(torch.int32) - 1, nearest.view(torch.int32)).view(torch.float32)
    scale = torch.where(step > 0, scale, 0.0)
    return torch.where(low.isnan(), 0.0, ((x_Gg - low) * scale).round()).long()


def _pack_fields(codes: Tensor, bits: int) -> Tensor:
    """int64 [n], n * bits a multiple of 8, as bytes: the first code in the lowest bits."""
    if bits < 8:
        shifts = torch.arange(0, 8, bits)
        return (codes.view(-1, 8 // bits) << shifts).sum(1).to(torch.uint8)
    shifts = torch.arange(0, bits, 8)
    return (codes[:, None] >> shifts & 0xFF).to(torch.uint8).view(-1)


def _unpack_fields(packed: Tensor, bits: int) -> Tensor:
    """int64 codes of bytes."""
    fields: Tensor
    if bits < 8:
        fields = packed.long()[:, None] >> torch.arange(0, 8, bits) & (2**bits - 1)
    else:
        fields = (packed.long().view(-1, bits // 8) << torch.arange(0, bits, 8)).sum(1)
    return fields.view(-1)


def group_pack(x: Tensor, bits: int, group: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes uint8 [G * g * bits / 8] and ranges bfloat16 [G, 2] (low, step) of x, rounded to nearest without a seed."""
    check_group([bits], group)
    _check_floats(x)
    flat = in_memory_order(x)
    x_Gg = _grouped(flat, group)
    if not len(x_Gg):
        return flat.new_empty(0, dtype=torch.uint8), flat.new_empty(0, 2, dtype=torch.bfloat16)
    low, step = _ranges(x_Gg, bits, torch.finfo(x.dtype).max)
    fixed = _fixed_point(x_Gg, low, step).view(-1)
    r = torch.tensor(ONE // 2) if seed is None else uniform(seed, len(fixed))
    codes = torch.where(low.isnan(), 0, ((fixed + r) // ONE).view(-1, group)).view(-1)
    codes[len(flat) :] = 0
    return _pack_fields(codes, bits), torch.cat([low, step], 1).bfloat16()


def group_unpack(codes: Tensor, ranges: Tensor, bits: int, group: int, n: int, dtype: torch.dtype) -> Tensor:
    """The n values [n] of codes and ranges."""
    check_group([bits], group)
    _check(dtype in FLOATS, f"dtype (={dtype}) is not float32, bfloat16 or float16")
    groups = -(-n // group)
    shapes = n >= 0 and codes.shape == (groups * group * bits // 8,) and ranges.shape == (groups, 2)
    _check(
        shapes and codes.dtype == torch.uint8 and ranges.dtype == torch.bfloat16,
        f"codes {list(codes.shape)} and ranges {list(ranges.shape)} are not those of n (={n}) elements in groups of"
        f" {group} with {bits} bits, uint8 [{groups * group * bits // 8}] and bfloat16 [{groups}, 2]",
    )
    low, step = ranges.detach().float().split(1, 1)
    values: Tensor = low + _unpack_fields(codes, bits).view(-1, group).float() * step
    return values.reshape(-1)[:n].to(dtype).clone()


def group_variance(x: Tensor, bits: Sequence[int], group: int) -> Tensor:
    """The variance that `group_pack` with a seed adds to each group, summed over it: float32 [len(bits), G]."""
    check_group(bits, group)
    _check_floats(x)
    flat = in_memory_order(x)
    x_Gg = _grouped(flat, group)
    out = flat.new_empty(len(bits), len(x_Gg), dtype=torch.float32)
    if not len(x_Gg):
        return out
    real = (torch.arange(x_Gg.numel()) < len(flat)).view(-1, group)
    for i, each in enumerate(bits):
        low, step = _ranges(x_Gg, each, torch.finfo(x.dtype).max)
        f = _fixed_point(x_Gg, low, step) % ONE
        total = (f * (ONE - f) * real).sum(1).double()
        square = step.view(-1).double() * step.view(-1).double()
        out[i] = torch.where(low.view(-1).isnan(), torch.nan, square * total / ONE**2)
    return out


def mask_pack(x: Tensor, threshold: float) -> Tensor:
    """Bits of x > threshold, uint8 [ceil(n / 8)], the first element in the lowest bit."""
    _check(x.is_floating_point() or x.dtype == torch.bool, f"x has dtype (={x.dtype}), not a float or bool")
    flat = in_memory_order(x)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    return _pack_bits(wide > torch.tensor(threshold, dtype=wide.dtype))


def _pack_bits(bits: Tensor) -> Tensor:
    return _pack_fields(F.pad(bits.long(), (0, -len(bits) % 8)), 1)


def two_values_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bits uint8 [ceil(n / 8)] and values [2] of an x with at most two distinct values; both empty if it has more.

    values[0] is the first element, and values[1] the other one (the first again where there is none).
    """
    _check(x.element_size() in _BITS_OF, f"x has dtype (={x.dtype}), whose elements are not 1, 2, 4 or 8 bytes")
    flat = in_memory_order(x)
    bits, values = flat.new_empty(0, dtype=torch.uint8), flat.new_empty(0)
    if not len(flat):
        return bits, values
    words = flat.view(_BITS_OF[x.element_size()])
    other = words != words[0]
    second = int(other.to(torch.uint8).argmax())
    if bool((words[other] != words[second]).any()):
        return bits, values
    return _pack_bits(other), flat[[0, second]]


def mask_unpack(bits: Tensor, values: Tensor, n: int) -> Tensor:
    """values[1] where a bit is set and values[0] elsewhere, [n] in the dtype of values."""
    _check(values.shape == (2,), f"values {list(values.shape)} is not [2]")
    size = n >= 0 and bits.shape == (-(-n // 8),) and bits.dtype == torch.uint8
    _check(size, f"bits {list(bits.shape)} is not uint8 [{-(-n // 8)}], one bit for each of n (={n}) elements")
    return values.detach()[_unpack_fields(bits, 1)[:n]]


def _check_narrow(bits: int) -> None:
    _check(bits in NARROW_BITS, f"bits (={bits}) is not one of 1, 2, 4, 8, 16, 32")


def narrow_pack(x: Tensor, bits: int, low: int) -> Tensor:
    """Integers low..low + 2^bits - 1 as fields of `bits`, uint8 [ceil(n * bits / 8)]."""
    _check_narrow(bits)
    _check(x.dtype in INTEGERS, f"x has dtype (={x.dtype}), not an integer or bool")
    codes = in_memory_order(x).long() - low
    inside = bool(((codes >= 0) & (codes < 2**bits)).all())
    _check(inside, f"x has values outside {low}..{low + 2**bits - 1}, the integers that {bits} bits hold from low")
    return _pack_fields(F.pad(codes, (0, -len(codes) % max(1, 8 // bits))), bits)


def narrow_unpack(codes: Tensor, bits: int, low: int, n: int, dtype: torch.dtype) -> Tensor:
    """The n integers [n] of `narrow_pack`."""
    _check_narrow(bits)
    _check(dtype in INTEGERS, f"dtype (={dtype}) is not an integer or bool")
    size = -(-n * bits // 8)
    fits = n >= 0 and codes.shape == (size,) and codes.dtype == torch.uint8
    _check(fits, f"codes {list(codes.shape)} is not uint8 [{size}], {bits} bits for each of n (={n}) elements")
    return (_unpack_fields(codes, bits)[:n] + low).to(dtype)


def moments(x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """float64 [7] (finite values, mean, sum of squared deviations, minimum, maximum, zeros, values not finite) and the
    histogram of the finite ones, int64 [bins] of equal width from minimum to maximum.

    Without a finite value mean, minimum and maximum are NaN.
    """
    _check_floats(x)
    _check(bins >= 1, f"bins (={bins}) is not at least 1")
    flat = in_memory_order(x).double()
    finite = flat[flat.isfinite()]
    histogram = torch.zeros(bins, dtype=torch.int64)
    mean = minimum = maximum = torch.tensor(torch.nan, dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    if len(finite):
        mean, minimum, maximum = finite.mean(), finite.amin() + 0.0, finite.amax() + 0.0
        squares = (finite - mean).square().sum()
        per_unit = torch.zeros_like(maximum)
        if bool(maximum > minimum):
            per_unit = torch.full_like(maximum, bins) / (maximum - minimum)
        place = ((finite - minimum) * per_unit).long().clamp_max(bins - 1)
        histogram = torch.bincount(place, minlength=bins)
    counts = torch.tensor([len(finite), int((flat == 0).sum()), len(flat) - len(finite)], dtype=torch.float64)
    return torch.stack([counts[0], mean, squares, minimum, maximum, counts[1], counts[2]]), histogram
