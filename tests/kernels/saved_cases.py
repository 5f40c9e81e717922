"""Random tensors to be saved."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.saved.reference import FLOATS
from tiny import generator

SIZES = st.sampled_from((0, 1, 7, 8, 9, 31, 32, 33, 95, 96, 97, 1023, 1024, 1025)) | st.integers(0, 5000)
GROUPS = st.sampled_from((32, 64, 96, 128, 256, 992, 1024))
SEEDS = st.none() | st.integers(-(2**63), 2**63 - 1)
WORDS = (
    torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.float64,
    torch.int64, torch.complex64,
)  # fmt: skip
RUN = 64
#: What whole runs of elements are made of.
KINDS = 9


def mixed(n: int, seed: int, dtype: torch.dtype = torch.float32, *, tame: bool = False) -> Tensor:
    """Runs of 64 elements, each of another size and place: constant ones, on a grid, and (unless tame) huge ones, tiny
    ones, denormal ones and ones with NaN or Inf.
    """
    g = generator(seed)
    runs = n // RUN + 1

    def spread(per_run: Tensor) -> Tensor:
        return per_run.repeat_interleave(RUN)[:n]

    size = 10 ** (4 * torch.rand(runs, generator=g) - 2)
    x = torch.randn(n, generator=g) * spread(size) + spread(torch.randn(runs, generator=g))
    kind = spread(torch.randint(0, 4 if tame else KINDS, (runs,), generator=g))
    limit = torch.finfo(dtype).max
    x = torch.where(kind == 1, spread(torch.randn(runs, generator=g)), x)
    x = torch.where(kind == 2, torch.randint(0, 4, (n,), generator=g).float(), x)
    x = torch.where(kind == 4, (torch.rand(n, generator=g) * 1.99 - 1) * limit, x)
    x = torch.where(kind == 5, torch.randn(n, generator=g) * 1e-34, x)
    x = torch.where(kind == 6, torch.randn(n, generator=g) * 1e-40, x)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")])[torch.randint(0, 3, (n,), generator=g)]
    x = torch.where((kind == 7) & (torch.rand(n, generator=g) < 0.03), odd, x)
    x = torch.where(kind == 8, torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0), x)
    return x.to(dtype)


@st.composite
def float_data(draw: st.DrawFn) -> Tensor:
    """A tensor of any size and dtype, of ordinary and of strange values."""
    return mixed(draw(SIZES), draw(st.integers(0, 10**6)), draw(st.sampled_from(FLOATS)), tame=draw(st.booleans()))


def same(got: Tensor, expected: Tensor) -> bool:
    """Equal to the bit, NaN being NaN, and zeros of either sign zero."""
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and bool(((got == expected) | (got.isnan() & expected.isnan())).all())
    )
