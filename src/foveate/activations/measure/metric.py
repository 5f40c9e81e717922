"""What an error of the gradient is measured against: one weight for each parameter tensor.

    error^2 = sum_t w_t E||g'_t - g_t||^2        t the parameter tensors that have a gradient

With the same weight for all, 1 / ||g||^2, it is the error of the gradient as one vector: what counts for SGD, whose
step is that vector. Adam divides each parameter's gradient by its own size, so a tensor whose gradient is a thousandth
of another's moves as far, and an error as large as that gradient is as bad as it would be there. Relative to each
parameter, with n_t values each,

    w_t = n_t / N / max(||g_t||^2, n_t floor^2)        N = sum_t n_t

the error is the root of the mean, over all values, of their tensors' squared relative errors. The floor is a hundredth
of the root mean square that half of all values' tensors have no more than: without it a gradient that is nothing but
noise (that of a key's bias, which softmax does not see: 5e-7 of the median in float32) would decide everything.

Sizes are those of the exact gradient where a step is audited, for one that is all error would hide behind its own size;
else of the gradient that training uses.

    T parameter tensors that have a gradient
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: The least root mean square that a tensor's gradient counts with, as a share of the median one.
FLOOR = 0.01


class Relative(enum.Enum):
    """What the error of a gradient is relative to."""

    #: Each parameter tensor's own gradient, as Adam and its kin see it: the mean over all values, of squares.
    EACH_PARAMETER = "each parameter"
    #: The gradient of all parameters together, as SGD sees it.
    WHOLE_GRADIENT = "whole gradient"


def weights_of(energy_T: Tensor, count_T: Tensor, relative_to: Relative) -> Tensor:
    """The weights w_t, float64 [T].

    Args:
        energy_T: ||g_t||^2, finite and not all 0.
        count_T: values of each tensor.
        relative_to: what errors are relative to.
    """
    energy_T, count_T = energy_T.double(), count_T.double()
    if relative_to is Relative.WHOLE_GRADIENT:
        return (1 / energy_T.sum()).expand(len(energy_T))
    square_T = energy_T / count_T
    return 1 / (count_T.sum() * square_T.clamp_min(FLOOR**2 * _median(square_T, count_T)))


def _median(square_T: Tensor, count_T: Tensor) -> Tensor:
    """The mean square that half of all values are in tensors of no more than; tensors without any gradient aside."""
    some_T = square_T > 0
    sorted_T, order_T = square_T[some_T].sort()
    below_T = count_T[some_T][order_T].cumsum(0)
    return sorted_T[int(torch.searchsorted(below_T, below_T[-1] / 2))]


class Weights:
    """The weights of one step's parameters, by tensor and by place in the model.

    Args:
        names: dotted names of the parameters that have a gradient.
        keys: what `of` knows them by.
        energy_T, count_T, relative_to: as for `weights_of`.
    """

    def __init__(
        self, names: Sequence[str], keys: Sequence[int], energy_T: Tensor, count_T: Tensor, relative_to: Relative
    ) -> None:
        weights = weights_of(energy_T, count_T, relative_to).tolist()
        self._of = dict(zip(keys, weights, strict=True))
        self._sums: dict[str, tuple[float, float]] = {}
        for name, weight, count in zip(names, weights, count_T.tolist(), strict=True):
            path = name
            while path:
                path = path.rpartition(".")[0]
                total, values = self._sums.get(path, (0.0, 0.0))
                self._sums[path] = total + weight * count, values + count

    def of(self, key: int) -> float:
        """A parameter's weight; the mean one where it is not among them (it is another model's)."""
        return self._of[key] if key in self._of else self.near("")

    def near(self, path: str) -> float:
        """The mean weight of the values in a module, or in the nearest around it that has any."""
        while path and path not in self._sums:
            path = path.rpartition(".")[0]
        total, values = self._sums[path]
        return total / values

    def error(self, squares: Mapping[int, float]) -> float:
        """The weighted sum of squared differences, by key."""
        return math.fsum(self._of[key] * square for key, square in squares.items())
