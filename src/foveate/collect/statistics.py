"""Running statistics of a small data set: input energies, output gradients and output ranges of every weight.

A weight has input rows x_t and output gradients g_t, of the loss of one sample. A change dW of the weight increases the
loss, to second order and with the Fisher information in place of the Hessian, by

    1/2 E[(sum_t g_t . dW x_t)^2]  ~  1/2 sum_ij F_ij dW_ij^2

Where the rows of a sample have independent labels (the tokens of a language model), F factors: F_ij = G_i A_j with
G = E[g^2] over outputs and A = E[x^2] over inputs (the diagonal of K-FAC: Martens and Grosse, arXiv:1503.05671). Where
all rows of a sample share one loss (the patches of an image, the tokens of an embedded sentence) their gradients are
correlated, so F is accumulated as the squared gradient of each sample. F of an embedding is the frequency of each row
times the energy of the gradient in each column.

Memory: factored statistics take N + K numbers for a weight, the others N x K. Rounding by descent also needs the
covariance of the inputs, K x K, and of the outputs' gradients, N x R with R at most 512. Statistics that take a matrix
for each weight are called large here; they may be collected for some of the weights at a time (`hold`, `release`). The
first pass also measures what each level of an input costs (`foveate.collect.inputs`). For that the inputs of one batch
are kept from its forward to its backward, or computed again (`foveate.collect.replay`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.collect.input_rows import InputRows, add_product, symmetric
from foveate.collect.inputs import InputStatistics
from foveate.collect.kinds import Kind, kind_of, patches, weight_matrix, weight_matrix_shape
from foveate.collect.objectives import Objective
from foveate.collect.sampling import RowSampler
from foveate.formats.packing import TILE_ROWS

#: Gradients of single samples are computed for this many numbers at a time.
_CHUNK = 1 << 24
#: A sample of more rows than this is a matrix product that is worth writing to memory.
_FEW_ROWS = 128
#: Rows for each input from which its covariance, and rows for each output of a block from which that of the gradients,
#: is taken from some of the rows. An error of 1 / 32 in d/n is a fraction of the damping.
_ROWS_PER_INPUT, _ROWS_PER_OUTPUT = 32, 16
#: The same for narrow layers, where rows cost little.
_LEAST_ROWS = 32768

#: The most outputs in one block of the gradients' covariance. A weight with more outputs for each input than the second
#: number is a vocabulary, whose gradients are hardly correlated: it has no such covariance.
COVARIANCE_BLOCK = 512
_MAX_OUTPUTS_PER_INPUT = 8
#: Input rows that must be seen for each output of a block: by fewer, joint rounding of rows would overfit.
_MIN_ROWS_PER_OUTPUT = 8


def block_rows(rows: int) -> int:
    """The outputs in a block of the gradients' covariance: blocks are about equal, and at most `COVARIANCE_BLOCK`."""
    blocks = -(-rows // COVARIANCE_BLOCK)
    return rows if blocks < 2 else min(-(-rows // blocks // TILE_ROWS) * TILE_ROWS, COVARIANCE_BLOCK)


def _blocks_of(rows: int) -> tuple[int, int, int]:
    """The shape of the gradients' covariance."""
    size = block_rows(rows)
    return -(-rows // size), size, size


@dataclass(frozen=True, eq=False)
class Factored:
    """The Fisher information of one sample in factors, F_ij = gradient_N[i] * energy_K[j].

    Attributes:
        gradient_N: E[g^2] of each output, summed over a sample's rows.
        energy_K: E[x^2] of each input.
    """

    gradient_N: Tensor
    energy_K: Tensor


class WeightStatistics:
    """Running sums of how one module uses its weight.

    Attributes:
        energy_K: sum over rows of x^2, float64.
        gradient_N: sum over rows of g^2, float64 (factored).
        fisher_NK: sum over samples of the squared gradient, float32 (not factored), while held.
        covariance_KK: the lower half of the sum over rows of x x^T, float32 (not embeddings, nor convolutions of
            groups), while held.
        covariance_rows: which rows the covariance is of (`foveate.collect.sampling`), float64 [3], while held.
        gradients_BRR: sum over rows of g g^T, float32, for each R outputs, until it is released.
        gradients_rows: which rows that is of, float64 [3].
        frequency_N, gradient_K: how often each row was read, and the energy of its gradient (embeddings).
        rows: how many rows of x were seen.
        output_range: the least and the greatest output.
        inputs: statistics of the input and what its levels cost; None for an embedding.
    """

    def __init__(self, shape: tuple[int, int], kind: Kind, factored: bool, covariance: bool, shards: int = 1) -> None:
        rows, columns = shape
        self.kind, self.factored, self._shards = kind, factored, shards
        self._large: dict[str, tuple[int, ...]] = {}
        if kind is not Kind.EMBEDDING:
            if not factored:
                self._large["fisher_NK"] = shape
            if covariance:
                self._large["covariance_KK"] = (columns, columns)
        self.tensors: dict[str, Tensor] = {
            "rows": torch.zeros((), dtype=torch.float64),
            "output_range": torch.tensor([float("inf"), float("-inf")]),
        }
        self.inputs = None if kind is Kind.EMBEDDING else InputStatistics(factored, shards)
        if kind is Kind.EMBEDDING:
            self.tensors["frequency_N"] = torch.zeros(rows, dtype=torch.float64)
            self.tensors["gradient_K"] = torch.zeros(columns, dtype=torch.float64)
        else:
            self.tensors["energy_K"] = torch.zeros(columns, dtype=torch.float64)
            if factored:
                self.tensors["gradient_N"] = torch.zeros(rows, dtype=torch.float64)
            if covariance and rows <= _MAX_OUTPUTS_PER_INPUT * columns:
                self.tensors["gradients_BRR"] = torch.zeros(_blocks_of(rows))
                self.tensors["gradients_rows"] = torch.zeros(3, dtype=torch.float64)

    @property
    def large_bytes(self) -> int:
        """Bytes of the large statistics, which exist only while they are held."""
        return sum(4 * math.prod(shape) for shape in self._large.values())

    @property
    def needs_gradients(self) -> bool:
        """Whether the large statistics need gradients."""
        return "fisher_NK" in self._large

    @property
    def kept_bytes(self) -> int:
        """Bytes of the gradients' covariance, which is kept from the first pass until the weight is rounded."""
        kept = self.tensors.get("gradients_BRR")
        return 0 if kept is None else 4 * kept.numel()

    def hold(self) -> None:
        """Make room for the large statistics, all zero."""
        self.tensors.update({key: torch.zeros(shape) for key, shape in self._large.items()})
        if "covariance_KK" in self._large:
            self.tensors["covariance_rows"] = torch.zeros(3, dtype=torch.float64)

    def release(self) -> None:
        """Free the memory of the large statistics and of the gradients' covariance."""
        for key in (*self._large, "gradients_BRR"):
            self.tensors.pop(key, None)

    def see(self, module: nn.Module, x: Tensor, y: Tensor, shared: InputRows | None = None) -> Callable[[Tensor], None]:
        """Take the inputs and outputs of one call; returns what takes the output's gradient.

        Args:
            module: the module that was called.
            x, y: its input and output.
            shared: the rows of x, if another layer has read them too.
        """
        low, high = y.detach().aminmax()
        limits = self.tensors["output_range"]
        self.tensors["output_range"] = torch.stack(
            [torch.minimum(limits[0], low.float()), torch.maximum(limits[1], high.float())]
        )
        if self.kind is Kind.EMBEDDING:
            self.tensors["frequency_N"] += torch.bincount(x.reshape(-1), minlength=len(self.tensors["frequency_N"]))
            self.tensors["rows"] += x.numel()
            return self._see_embedding_gradient
        if self.kind is Kind.CONV:
            columns = patches(cast(nn.Conv2d, module), x.detach().float())
            self.tensors["energy_K"] += columns.square().sum((0, 1, 3))
            self.tensors["rows"] += columns.shape[0] * columns.shape[1] * columns.shape[3]
            self._see_patches(columns)
            return self._see_conv_inputs(cast(nn.Conv2d, module), x.detach(), columns)
        rows = InputRows(x) if shared is None else shared
        self.tensors["energy_K"] += rows.squares_K
        self.tensors["rows"] += len(rows.x_TK)
        self._see_rows(rows)
        inputs = cast(InputStatistics, self.inputs)
        inputs.see_rows(rows)
        x_BTK = rows.x_TK.view(len(x) if x.dim() > 1 else 1, -1, x.shape[-1])
        samples, each, _ = x_BTK.shape
        # what backward needs is copied, since the model may change x in place before
        scorer = inputs.scorer(x_BTK, rows) if rows.x_TK.numel() else None
        kept_BTK = None if self.factored else x_BTK.clone()

        def after(g: Tensor) -> None:
            g_BTN = g.float().reshape(samples, each, -1)
            self._see_gradient_covariance(g_BTN.flatten(0, 1))
            if scorer is not None:
                scorer.take(g_BTN, weight_matrix(module))
            if kept_BTK is None:
                self.tensors["gradient_N"] += _squares(g)
            else:
                self._see_sample_gradients(kept_BTK, g_BTN)

        return after

    def see_large(
        self, module: nn.Module, x: Tensor, shared: InputRows | None = None
    ) -> Callable[[Tensor], None] | None:
        """Take the large statistics alone, of a call that `see` has seen before.

        Returns what takes the gradient of the output, if that is needed. The arguments are those of `see`.
        """
        if self.kind is Kind.CONV:
            columns_BgKP = patches(cast(nn.Conv2d, module), x.detach().float())
            self._see_patches(columns_BgKP)
            return lambda g: self._see_conv_gradient(columns_BgKP, g)
        rows = InputRows(x) if shared is None else shared
        self._see_rows(rows)
        if self.factored:
            return None
        x_BTK = rows.x_TK.view(len(x) if x.dim() > 1 else 1, -1, x.shape[-1]).clone()
        return lambda g: self._see_sample_gradients(x_BTK, g.float().reshape(*x_BTK.shape[:2], -1))

    def _see_conv_inputs(self, conv: nn.Conv2d, x: Tensor, columns_BgKP: Tensor) -> Callable[[Tensor], None]:
        inputs = cast(InputStatistics, self.inputs)
        inputs.see(x, columns_BgKP.transpose(2, 3))
        w_NK = weight_matrix(conv)
        # a grouped convolution is computed from its inputs as they are
        scorer = inputs.scorer(columns_BgKP[:, 0].transpose(1, 2)) if conv.groups == 1 else None

        def after(g: Tensor) -> None:
            g_BPN = g.float().reshape(len(columns_BgKP), -1, columns_BgKP.shape[3]).transpose(1, 2)
            self._see_gradient_covariance(g_BPN.flatten(0, 1))
            self._see_conv_gradient(columns_BgKP, g)
            if scorer is not None:
                scorer.take(g_BPN, w_NK)

        return after

    def _see_rows(self, rows: InputRows) -> None:
        if "covariance_KK" in self.tensors and len(rows.x_TK):
            taken = self._covariance_rows().take(len(rows.x_TK))
            self.tensors["covariance_KK"].add_(rows.product(taken.rows), alpha=taken.weight)

    def _see_patches(self, columns_BgKP: Tensor) -> None:
        if "covariance_KK" in self.tensors:
            rows_MK = columns_BgKP.permute(0, 1, 3, 2).reshape(-1, columns_BgKP.shape[2])
            taken = self._covariance_rows().take(len(rows_MK))
            add_product(self.tensors["covariance_KK"], rows_MK[taken.rows], taken.weight)

    def _covariance_rows(self) -> RowSampler:
        columns = len(self.tensors["covariance_KK"])
        enough = max(_ROWS_PER_INPUT * columns, _LEAST_ROWS)
        return RowSampler(self.tensors["covariance_rows"], enough // self._shards)

    def _see_gradient_covariance(self, g_TN: Tensor) -> None:
        total_BRR = self.tensors.get("gradients_BRR")
        if total_BRR is not None and len(g_TN):
            blocks, size = total_BRR.shape[:2]
            enough = max(_ROWS_PER_OUTPUT * size, _LEAST_ROWS)
            taken = RowSampler(self.tensors["gradients_rows"], enough // self._shards).take(len(g_TN))
            g_TN = g_TN[taken.rows]
            g_BTR = F.pad(g_TN, (0, blocks * size - g_TN.shape[1])).view(-1, blocks, size).transpose(0, 1)
            total_BRR.baddbmm_(g_BTR.transpose(1, 2), g_BTR, alpha=taken.weight)

    def _see_embedding_gradient(self, g: Tensor) -> None:
        self.tensors["gradient_K"] += _squares(g)

    def _see_conv_gradient(self, columns_BgKP: Tensor, g: Tensor) -> None:
        batch, groups, _, positions = columns_BgKP.shape
        g_BgNP = g.float().reshape(batch, groups, -1, positions)
        rows = g_BgNP.shape[2]
        for i in range(groups):
            part = slice(i * rows, (i + 1) * rows)
            self._see_sample_gradients(columns_BgKP[:, i].transpose(1, 2), g_BgNP[:, i].transpose(1, 2), part)

    def _see_sample_gradients(self, x_BTK: Tensor, g_BTN: Tensor, rows: slice = slice(None)) -> None:
        if "fisher_NK" not in self.tensors:
            return
        fisher = self.tensors["fisher_NK"][rows]
        if x_BTK.shape[1] <= _FEW_ROWS:
            torch.ops.foveate.add_squared_gradients(fisher, x_BTK, g_BTN)
            return
        step = max(1, _CHUNK // fisher.numel())
        for at in range(0, len(x_BTK), step):
            gradients = torch.bmm(g_BTN[at : at + step].transpose(1, 2), x_BTK[at : at + step])
            fisher += gradients.square_().sum(0)

    def input_energy(self) -> Tensor | None:
        """The mean of x^2 for each input (A), float32 [K]; None for an embedding."""
        if self.kind is Kind.EMBEDDING:
            return None
        return (self.tensors["energy_K"] / self.tensors["rows"].clamp_min(1)).float()

    def covariance(self) -> Tensor | None:
        """E[x x^T], float32 [K, K]; None where it is not held or nothing was seen."""
        total = self.tensors.get("covariance_KK")
        rows = float(self.tensors["rows"])
        return symmetric(total).div_(rows) if total is not None and rows else None

    def gradients(self) -> Tensor | None:
        """E[g g^T], float32 [B, R, R], for each R outputs; None if not held, or if too few rows were seen."""
        total = self.tensors.get("gradients_BRR")
        if total is None or float(self.tensors["gradients_rows"][1]) < _MIN_ROWS_PER_OUTPUT * total.shape[1]:
            return None
        # a product g^T g is symmetric only as far as the machine's order of additions is
        return symmetric(total).div_(float(self.tensors["rows"]))

    def fisher(self, samples: int) -> Tensor | Factored:
        """F for one sample: [N, K], or its factors."""
        t = self.tensors
        seen = t["rows"].clamp_min(1)
        if self.kind is Kind.EMBEDDING:
            # half a count more for each row, so that a token that calibration never met has a cost
            frequency = (t["frequency_N"] + 0.5) * t["rows"] / (t["rows"] + 0.5 * len(t["frequency_N"]))
            return Factored((frequency / samples).float(), (t["gradient_K"] / seen).float())
        if self.factored:
            return Factored((t["gradient_N"] / samples).float(), (t["energy_K"] / seen).float())
        return t["fisher_NK"] / samples


def _squares(g: Tensor) -> Tensor:
    """The sum over rows of g^2, float64 [N]."""
    squares_N: Tensor = torch.ops.foveate.row_sums(g.float().reshape(-1, g.shape[-1]))[0]
    return squares_N


def statistics_of(module: nn.Module, objective: Objective, shards: int = 1) -> WeightStatistics:
    """Empty statistics of a module, the large ones not held yet, for data that are cut into so many shards."""
    kind = kind_of(module)
    assert kind is not None, type(module).__name__
    factored = kind is Kind.EMBEDDING or (objective.independent_rows and kind is not Kind.CONV)
    covariance = getattr(module, "groups", 1) == 1
    return WeightStatistics(weight_matrix_shape(module), kind, factored, covariance, shards)
