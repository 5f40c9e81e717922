"""The input of linear layers in one call: what is computed from it, once for all layers that read it.

The projections of an attention layer read one tensor, and so do the two branches of a gated layer. Their sums over
rows, their counts of codes and the product of the input with itself are the same, and the product is the largest part
of all statistics. So these are kept until another input comes.

Legend: T rows and K columns of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.kernels.planes.inputs import INPUT_RANGE

#: How many codes the 8-bit quantizer has.
CODES = 255
#: The most values of a call whose codes are counted.
_COUNTED = 1 << 14
#: Columns of the blocks in which one half of a symmetric product is computed.
_PRODUCT_BLOCK = 256


class InputRows:
    """One input, and what was computed from it.

    Attributes:
        x_TK: the rows, float32. They are not copied, so everything must be computed before the model goes on.
        squares_K: the sum of squares of each column, float64.
        totals: the sum, the least and the greatest value, float64 [3].
    """

    def __init__(self, x: Tensor) -> None:
        self.x_TK = x.detach().float().reshape(-1, x.shape[-1])
        self.squares_K, self.totals = torch.ops.foveate.row_sums(self.x_TK)
        self._came, self._version = x, x._version
        self._codes: Tensor | None = None
        self._products: dict[tuple[int, int], Tensor] = {}
        self._copies: dict[tuple[int, int], Tensor] = {}

    def are_of(self, x: Tensor) -> bool:
        """Whether these are the rows of a tensor, and it has not changed since."""
        return x is self._came and x._version == self._version

    def codes(self) -> Tensor:
        """How often the 8-bit quantizer gives each code in some of the rows, float64 [255]."""
        if self._codes is None:
            self._codes = counted_codes(self.x_TK)
        return self._codes

    def copy(self, rows: slice) -> Tensor:
        """A copy of some rows, one for all layers that ask for these."""
        key = (rows.start, rows.step)
        if key not in self._copies:
            self._copies[key] = self.x_TK[rows].clone()
        return self._copies[key]

    def product(self, rows: slice) -> Tensor:
        """x^T x of some rows, float32 [K, K], as `add_product` computes it."""
        key = (rows.start, rows.step)
        if key not in self._products:
            columns = self.x_TK.shape[1]
            self._products[key] = add_product(torch.zeros(columns, columns), self.x_TK[rows], 1.0)
        return self._products[key]


def counted_codes(rows: Tensor) -> Tensor:
    """How often the 8-bit quantizer gives each code, float64 [255].

    Args:
        rows: [..., K]; evenly spread ones stand for all where there are many.
    """
    some = rows.reshape(-1, rows.shape[-1])
    some = some[:: max(1, some.numel() // _COUNTED)].float()
    largest = some.abs().amax(1, keepdim=True)
    codes = torch.where(largest > 0, some * (INPUT_RANGE[8] / largest), 0.0).round_().nan_to_num_(0.0)
    middle = CODES // 2
    return torch.bincount(codes.flatten().long().clamp_(-middle, middle) + middle, minlength=CODES).double()


def add_product(total_KK: Tensor, x_TK: Tensor, weight: float) -> Tensor:
    """Add weight * x^T x to the lower half of a matrix, in place; some of the upper half may be written too."""
    for start in range(0, len(total_KK), _PRODUCT_BLOCK):
        part = total_KK[start:, start : start + _PRODUCT_BLOCK]
        part.addmm_(x_TK[:, start:].t(), x_TK[:, start : start + _PRODUCT_BLOCK], alpha=weight)
    return total_KK


def symmetric(total_KK: Tensor) -> Tensor:
    """The symmetric matrix, or matrices [..., K, K], of which the lower half is given."""
    return total_KK.tril() + total_KK.tril(-1).mT
