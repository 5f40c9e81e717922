"""Statistics of each layer's input, and what each of its levels costs.

The input rows x_t of a layer, quantized to a level, have errors dx_t. With g_t the gradient of the loss with respect to
the output row, the errors change the loss by the sum of g_t . W dx_t, and increase the divergence by

    S(level) = 1/2 E[(sum_t g_t . W dx_t)^2]

as a change of the weights does (`foveate.collect.statistics`). This is not approximated: dx_t is the error that the
kernels make, row by row, and its product with the gradient is computed. Where the rows of a sample have labels of their
own (the tokens of a language model) the squares are summed; where they share one loss, the sum is squared.

The moments, the range and the entropy of the input are kept too. Drift is detected by them, static scales are made from
them, and `variance_proxy` chooses levels by them without any gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.kernels.planes.reference import INPUT_RANGE, block_codes, quantize_input

#: How many values are quantized at a time: they fit into the second-level cache a few times over.
_CHUNK = 1 << 16
#: In a call with more values than this, not every sample is scored.
_SCORED = 1 << 21
_SCORED_LEVELS = (4, 8)
#: The most values of a call whose codes are counted.
_COUNTED = 1 << 16
_CODES = 255


class InputStatistics:
    """Running sums of one layer's input, float64 where they grow.

    Attributes:
        tensors: `moments` [3]: the number of values, their sum, the sum of their squares; `range` [2]; `codes` [255]:
            how often the 8-bit quantizer gave each code; `losses` [2]: the sum over samples of the squared change that
            levels 4 and 8 make; `batch_moments` [2, 2]: the least and the greatest mean and variance of a call;
            `calls`: the number of calls; `values`: how many values matrix products read.
    """

    def __init__(self) -> None:
        inf = math.inf
        self.tensors: dict[str, Tensor] = {
            "moments": torch.zeros(3, dtype=torch.float64),
            "range": torch.tensor([inf, -inf]),
            "codes": torch.zeros(_CODES, dtype=torch.float64),
            "losses": torch.zeros(len(_SCORED_LEVELS), dtype=torch.float64),
            "batch_moments": torch.tensor([[inf, inf], [-inf, -inf]], dtype=torch.float64),
            "calls": torch.zeros((), dtype=torch.float64),
            "values": torch.zeros((), dtype=torch.float64),
        }

    def see(self, x: Tensor, rows: Tensor) -> None:
        """Take one call's input as it came, and as the rows [..., K] that the product reads."""
        count = x.numel()
        if not count:
            return
        t = self.tensors
        variance, mean = (float(v) for v in torch.var_mean(x.float(), correction=0))
        t["moments"] += torch.tensor([count, mean * count, (variance + mean * mean) * count], dtype=torch.float64)
        low, high = x.aminmax()
        t["range"] = torch.stack(
            [torch.minimum(t["range"][0], low.float()), torch.maximum(t["range"][1], high.float())]
        )
        now = torch.tensor([mean, variance], dtype=torch.float64)
        least, greatest = t["batch_moments"]
        t["batch_moments"] = torch.stack([torch.minimum(least, now), torch.maximum(greatest, now)])
        t["calls"] += 1
        t["values"] += rows.numel()
        some = rows.reshape(-1, rows.shape[-1])[:: max(1, rows.numel() // _COUNTED)]
        codes, _ = quantize_input(some.float(), 8)
        t["codes"] += torch.bincount(codes.reshape(-1).long() + _CODES // 2, minlength=_CODES)

    def score(self, x_BTK: Tensor, g_BTN: Tensor, w_NK: Tensor, independent_rows: bool) -> None:
        """Take the input rows of B samples, T rows each, and the gradients of their output rows.

        In a call with very many values, evenly spread samples stand for all.
        """
        if not x_BTK.numel():
            return
        every = min(-(-x_BTK.numel() // _SCORED), len(x_BTK))
        weight = len(x_BTK) / len(range(0, len(x_BTK), every))
        x_BTK, g_BTN = x_BTK[::every], g_BTN[::every]
        samples, rows, columns = x_BTK.shape
        step, row_step = max(1, _CHUNK // (rows * columns)), max(1, _CHUNK // columns)
        for at in range(0, samples, step):
            change_LB = torch.zeros(len(_SCORED_LEVELS), min(step, samples - at), dtype=torch.float64)
            for row in range(0, rows, row_step):
                part = (slice(at, at + step), slice(row, row + row_step))
                change_LBT = _changes(x_BTK[part], g_BTN[part], w_NK)
                change_LB += change_LBT.square().sum(2) if independent_rows else change_LBT.sum(2)
            squares_L = (change_LB if independent_rows else change_LB.square()).sum(1)
            self.tensors["losses"] += weight * squares_L

    def losses(self, samples: int) -> Tensor:
        """What each of INPUT_LEVELS costs a sample, float32 [1, 4].

        The grid of 16 bits is the grid of 8 bits with steps 256 times smaller, and so are its errors.
        """
        four, eight = (0.5 * self.tensors["losses"] / max(samples, 1)).tolist()
        finer = (INPUT_RANGE[8] / INPUT_RANGE[16]) ** 2
        return torch.tensor([[four, eight, finer * eight, 0.0]])

    def summary(self, samples: int) -> dict[str, Tensor]:
        """What a profile keeps of a layer's input, float32 (see `foveate.Profile`); empty if nothing was seen."""
        t = self.tensors
        count, total, squares = t["moments"].tolist()
        if not count:
            return {}
        mean = total / count
        probability = t["codes"] / t["codes"].sum()
        entropy = -(probability * probability.clamp_min(1e-300).log2()).sum()
        return {
            "mean": torch.tensor([mean]),
            "variance": torch.tensor([max(squares / count - mean * mean, 0.0)]),
            "range": t["range"].float(),
            "entropy": entropy.float().view(1),
            "values": (t["values"].view(1) / max(samples, 1)).float(),
            "batch_moments": t["batch_moments"].float(),
            "batch_values": (t["moments"][:1] / t["calls"]).float(),
        }


def _changes(x_BTK: Tensor, g_BTN: Tensor, w_NK: Tensor) -> Tensor:
    """g . W dx of each row at each scored level, float64 [L, B, T]. Rows are finite, since the loss is."""
    x_MK = x_BTK.reshape(-1, x_BTK.shape[-1])
    toward_MK = g_BTN.reshape(-1, g_BTN.shape[-1]) @ w_NK
    codes_MK, unit_M1 = block_codes(x_MK)
    four_M = codes_MK.mul_(unit_M1).sub_(x_MK).mul_(toward_MK).sum(1, dtype=torch.float64)
    top = INPUT_RANGE[8]
    largest_M1 = x_MK.abs().amax(1, keepdim=True).clamp_min(1e-30)
    codes_MK = (x_MK * (top / largest_M1)).round_()
    eight_M = codes_MK.mul_(largest_M1 / top).sub_(x_MK).mul_(toward_MK).sum(1, dtype=torch.float64)
    # a row of zeros is exact, and its unit is 0
    return torch.stack([torch.where(unit_M1[:, 0] > 0, four_M, 0.0), eight_M]).view(-1, *x_BTK.shape[:2])
