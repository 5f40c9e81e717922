"""Statistics of each layer's input, and what each of its levels costs.

The input rows x_t of a layer, quantized to a level, have errors dx_t. With g_t the gradient of the loss with respect to
the output row, the errors change the loss by the sum of g_t . W dx_t, and increase the divergence by

    S(level) = 1/2 E[(sum_t g_t . W dx_t)^2]

as a change of the weights does (`foveate.collect.statistics`). dx_t is the error that the kernels make, row by row, and
its product with the gradient is computed, for some of the rows where there are many. Where the rows of a sample have
labels of their own (the tokens of a language model) the squares are summed; where they share one loss, the sum is
squared.

The moments, the range and the entropy of the input are kept too. Drift is detected by them, static scales are made from
them, and `variance_proxy` chooses levels by them without any gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.collect.input_rows import CODES, InputRows, counted_codes
from foveate.collect.sampling import RowSampler
from foveate.kernels.planes.inputs import INPUT_RANGE

_SCORED_LEVELS = (4, 8)
#: How many rows with a loss of their own, or how many samples of rows that share one, are enough to score.
_ENOUGH_ROWS, _ENOUGH_SAMPLES = 1024, 512
#: How many values are scored at a time.
_CHUNK = 1 << 20


class InputStatistics:
    """Running sums of one layer's input, float64 where they grow.

    Attributes:
        tensors: `moments` [3]: the number of values, their sum, the sum of their squares; `range` [2]; `codes` [255]:
            how often the 8-bit quantizer gave each code; `losses` [2]: the sum over samples of the squared change that
            levels 4 and 8 make; `batch_moments` [2, 2]: the least and the greatest mean and variance of a call;
            `calls`: the number of calls; `values`: how many values matrix products read; `scored` [3]: which rows were
            scored (`foveate.collect.sampling`).
        independent_rows, shards: as given.
    """

    def __init__(self, independent_rows: bool = False, shards: int = 1) -> None:
        """
        Args:
            independent_rows: whether the rows of a sample have losses of their own.
            shards: into how many parts the data are cut, each of which is collected from the beginning.
        """
        inf = math.inf
        self.independent_rows, self.shards = independent_rows, shards
        self.tensors: dict[str, Tensor] = {
            "moments": torch.zeros(3, dtype=torch.float64),
            "range": torch.tensor([inf, -inf]),
            "codes": torch.zeros(CODES, dtype=torch.float64),
            "losses": torch.zeros(len(_SCORED_LEVELS), dtype=torch.float64),
            "batch_moments": torch.tensor([[inf, inf], [-inf, -inf]], dtype=torch.float64),
            "calls": torch.zeros((), dtype=torch.float64),
            "values": torch.zeros((), dtype=torch.float64),
            "scored": torch.zeros(3, dtype=torch.float64),
        }

    def see(self, x: Tensor, rows: Tensor) -> None:
        """Take one call's input as it came, and as the rows [..., K] that the product reads."""
        if x.numel():
            flat = x.detach().float().reshape(1, -1) if x.dim() < 2 else x.detach().float().flatten(0, -2)
            squares, totals = torch.ops.foveate.row_sums(flat)
            self._see(x.numel(), squares, totals, rows.numel(), counted_codes(rows))

    def see_rows(self, rows: InputRows) -> None:
        """Take one call's input, whose rows the product reads as they are."""
        values = rows.x_TK.numel()
        if values:
            self._see(values, rows.squares_K, rows.totals, values, rows.codes())

    def _see(self, count: int, squares: Tensor, totals: Tensor, read: int, codes: Tensor) -> None:
        t = self.tensors
        total, low, high = totals.tolist()
        square, mean = float(squares.sum()), total / count
        variance = max(square / count - mean * mean, 0.0)
        t["moments"] += torch.tensor([count, total, square], dtype=torch.float64)
        t["range"] = torch.stack([t["range"][0].clamp_max(low), t["range"][1].clamp_min(high)])
        now = torch.tensor([mean, variance], dtype=torch.float64)
        least, greatest = t["batch_moments"]
        t["batch_moments"] = torch.stack([torch.minimum(least, now), torch.maximum(greatest, now)])
        t["calls"] += 1
        t["values"] += read
        t["codes"] += codes

    def scorer(self, x_BTK: Tensor, shared: InputRows | None = None) -> InputScorer:
        """Choose the rows of a call that are scored when the gradients of their outputs are known; they are copied.

        Args:
            x_BTK: the input rows of B samples, T rows each.
            shared: the same rows, whose copies other layers may use too.
        """
        return InputScorer(self, x_BTK, shared)

    def score(self, x_BTK: Tensor, g_BTN: Tensor, w_NK: Tensor) -> None:
        """Take the input rows of B samples, T rows each, and the gradients of their output rows.

        Where there are many, some rows stand for all, or some samples where the rows of a sample share a loss.
        """
        if x_BTK.numel():
            self.scorer(x_BTK).take(g_BTN, w_NK)

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


class InputScorer:
    """Rows of one call, until the gradients of their outputs are known.

    Attributes:
        x_BTK: a copy of the rows that are scored. Rows with losses of their own are samples of one row each.
    """

    def __init__(self, inputs: InputStatistics, x_BTK: Tensor, shared: InputRows | None) -> None:
        self._inputs, self._alone = inputs, inputs.independent_rows
        each_BTK = x_BTK.reshape(-1, 1, x_BTK.shape[-1]) if self._alone else x_BTK
        enough = _ENOUGH_ROWS if self._alone else _ENOUGH_SAMPLES
        self._taken = RowSampler(inputs.tensors["scored"], enough // inputs.shards).take(len(each_BTK))
        if shared is not None and self._alone:
            self.x_BTK = shared.copy(self._taken.rows)[:, None]
        else:
            self.x_BTK = each_BTK[self._taken.rows].clone()

    def take(self, g_BTN: Tensor, w_NK: Tensor) -> None:
        """Add the squared changes, given the gradients of all output rows of the call."""
        g_BTN = (g_BTN.reshape(-1, 1, g_BTN.shape[-1]) if self._alone else g_BTN)[self._taken.rows]
        samples, rows, columns = self.x_BTK.shape
        change_LM = torch.empty(len(_SCORED_LEVELS), samples * rows, dtype=torch.float64)
        x_MK, g_MN = self.x_BTK.reshape(-1, columns), g_BTN.reshape(-1, g_BTN.shape[-1])
        step = max(1, _CHUNK // max(columns, g_MN.shape[1]))
        for at in range(0, len(x_MK), step):
            part = slice(at, at + step)
            change_LM[:, part] = torch.ops.foveate.input_changes(x_MK[part], g_MN[part] @ w_NK)
        squares_L = change_LM.view(-1, samples, rows).sum(2).square().sum(1)
        self._inputs.tensors["losses"] += self._taken.weight * squares_L
