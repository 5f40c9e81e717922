"""The ops on what autograd saves for backward: values in groups of few bits, masks, small integers, statistics.

Every tensor that comes in is read flat, in the order of its memory: it may be transposed or channels-last, but must
have no gaps and no overlaps. kernels/saved/reference.py has the meaning of each op, docs/format.md the bytes.

None is differentiable: what they return never requires a gradient, whatever comes in, and no autograd node is made.

- `group_pack(x, bits, group, seed)`: float32, bfloat16 or float16 in groups of 32 to 1024 (a multiple of 32), each with
  a bfloat16 low and step; codes of 2, 4, 8 or 16 bits, rounded stochastically by a seed, else to nearest. A group that
  holds NaN or Inf, or whose range overflows, has a low of NaN: look at `ranges` and keep such tensors as they are.
- `group_unpack(codes, ranges, bits, group, n, dtype)`: the values.
- `group_variance(x, bits, group)`: the variance that a seed adds at each of some bits, summed over each group.
- `mask_pack(x, threshold)`: bits of x > threshold. `two_values_pack(x)`: a bit an element, and the two values of an x
  that holds no third (by their bits, of any dtype); both empty else. `mask_unpack(bits, values, n)` reads both.
- `narrow_pack(x, bits, low)` and `narrow_unpack(codes, bits, low, n, dtype)`: integers from low in 1 to 32 bits.
- `moments(x, bins)`: count, mean, squared deviations, extremes, zeros, values that are not finite, and a histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.library import LIBRARY, define
from foveate.kernels.saved import reference as reference

_SCHEMAS: dict[str, Callable[..., Any]] = {
    "group_pack(Tensor x, int bits, int group, int? seed=None) -> (Tensor, Tensor)": reference.group_pack,
    "group_unpack(Tensor codes, Tensor ranges, int bits, int group, SymInt n, ScalarType dtype) -> Tensor": (
        reference.group_unpack
    ),
    "group_variance(Tensor x, int[] bits, int group) -> Tensor": reference.group_variance,
    "mask_pack(Tensor x, float threshold) -> Tensor": reference.mask_pack,
    "two_values_pack(Tensor x) -> (Tensor, Tensor)": reference.two_values_pack,
    "mask_unpack(Tensor bits, Tensor values, SymInt n) -> Tensor": reference.mask_unpack,
    "narrow_pack(Tensor x, int bits, int low) -> Tensor": reference.narrow_pack,
    "narrow_unpack(Tensor codes, int bits, int low, SymInt n, ScalarType dtype) -> Tensor": reference.narrow_unpack,
    "moments(Tensor x, int bins) -> (Tensor, Tensor)": reference.moments,
}

for _schema, _meaning in _SCHEMAS.items():
    _name = define(_schema, _meaning)
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _bytes(like: Tensor, size: int | torch.SymInt) -> Tensor:
    return like.new_empty(size, dtype=torch.uint8)


def _over(count: int, each: int) -> int:
    """ceil(count / each), also of a symbol."""
    return (count + each - 1) // each


@torch.library.register_fake("foveate::group_pack", lib=LIBRARY)
def _group_pack_fake(x: Tensor, bits: int, group: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    reference.check_group([bits], group)
    groups = _over(x.numel(), group)
    return _bytes(x, groups * (group * bits // 8)), x.new_empty(groups, 2, dtype=torch.bfloat16)


@torch.library.register_fake("foveate::group_unpack", lib=LIBRARY)
def _group_unpack_fake(codes: Tensor, ranges: Tensor, bits: int, group: int, n: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(n, dtype=dtype)


@torch.library.register_fake("foveate::group_variance", lib=LIBRARY)
def _group_variance_fake(x: Tensor, bits: Sequence[int], group: int) -> Tensor:
    reference.check_group(bits, group)
    return x.new_empty(len(bits), _over(x.numel(), group), dtype=torch.float32)


@torch.library.register_fake("foveate::mask_pack", lib=LIBRARY)
def _mask_pack_fake(x: Tensor, threshold: float) -> Tensor:
    return _bytes(x, _over(x.numel(), 8))


@torch.library.register_fake("foveate::two_values_pack", lib=LIBRARY)
def _two_values_pack_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()  # what x holds decides the sizes
    return _bytes(x, context.new_dynamic_size()), x.new_empty(context.new_dynamic_size())


@torch.library.register_fake("foveate::mask_unpack", lib=LIBRARY)
def _mask_unpack_fake(bits: Tensor, values: Tensor, n: int) -> Tensor:
    return values.new_empty(n)


@torch.library.register_fake("foveate::narrow_pack", lib=LIBRARY)
def _narrow_pack_fake(x: Tensor, bits: int, low: int) -> Tensor:
    return _bytes(x, _over(x.numel() * bits, 8))


@torch.library.register_fake("foveate::narrow_unpack", lib=LIBRARY)
def _narrow_unpack_fake(codes: Tensor, bits: int, low: int, n: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(n, dtype=dtype)


@torch.library.register_fake("foveate::moments", lib=LIBRARY)
def _moments_fake(x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(7, dtype=torch.float64), x.new_empty(bins, dtype=torch.int64)
