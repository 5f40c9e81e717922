"""The closed forms against measured errors of the gradient of a weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.activations.measure.closed_forms import conv_error, conv_options, linear_error, row_sums
from foveate.kernels.backends.table import ensure_loaded

GROUP, LEVEL, TRIALS = 32, 4, 300


def _rounded(x: Tensor, seed: int) -> Tensor:
    ensure_loaded()
    flat = x.as_strided((x.numel(),), (1,))
    codes, ranges = torch.ops.foveate.group_pack(flat, LEVEL, GROUP, seed)
    values = torch.ops.foveate.group_unpack(codes, ranges, LEVEL, GROUP, x.numel(), x.dtype)
    out: Tensor = values.as_strided(x.shape, x.stride())
    return out


def _variance(x: Tensor) -> Tensor:
    ensure_loaded()
    found: Tensor = torch.ops.foveate.group_variance(x.as_strided((x.numel(),), (1,)), [LEVEL], GROUP)
    return found


def test_row_sums_share_a_group_that_straddles_rows() -> None:
    rows, columns = 7, 45
    variance = torch.rand(2, -(-rows * columns // GROUP))
    counts = torch.full((variance.shape[1],), float(GROUP))
    counts[-1] = rows * columns - GROUP * (len(counts) - 1)
    each = (variance / counts).repeat_interleave(GROUP, 1)[:, : rows * columns].view(2, rows, columns)
    torch.testing.assert_close(row_sums(variance, GROUP, rows, columns), each.sum(-1))


def test_a_linear_layers_error_is_what_rounding_makes_of_it() -> None:
    torch.manual_seed(0)
    x_NK, g_NM = torch.randn(24, 64) * torch.rand(24, 1), torch.randn(24, 16) * torch.rand(24, 1)
    exact = g_NM.t() @ x_NK
    true = sum(float((g_NM.t() @ _rounded(x_NK, seed) - exact).square().sum()) for seed in range(TRIALS)) / TRIALS
    predicted = float(linear_error(_variance(x_NK), GROUP, g_NM, 64)[0])
    assert predicted == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize(
    "given",
    [
        {"padding": 1},
        {"stride": 2, "padding": 1},
        {"dilation": 2},
        {"groups": 2, "padding": 1},
        {"padding": "same"},
        {"stride": (2, 1), "padding": (0, 2)},
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_convolutions_error_is_what_rounding_makes_of_it(given: dict[str, object], last: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 10, 9)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 4 // int(given.get("groups", 1)), 3, 3)  # type: ignore[call-overload]
    w = weight.clone().requires_grad_()
    y = F.conv2d(x, w, None, **given)  # type: ignore[arg-type]
    g = torch.randn_like(y)

    def gradient(values: Tensor) -> Tensor:
        return torch.autograd.grad(F.conv2d(values, w, None, **given), w, g)[0]  # type: ignore[arg-type]

    exact = gradient(x)
    true = sum(float((gradient(_rounded(x, s)) - exact).square().sum()) for s in range(TRIALS)) / TRIALS
    kernel, options = conv_options((x, w, None), given)
    predicted = conv_error(_variance(x), GROUP, g, x.shape, x.stride(), kernel, options)
    assert float(predicted[0]) == pytest.approx(true, rel=0.1)


def test_a_convolution_whose_window_only_meets_padding_beyond_the_image() -> None:
    x, w = torch.randn(2, 4, 4, 4), torch.randn(4, 4, 1, 1)
    kernel, options = conv_options((x, w, None), {"stride": 8, "padding": 2})
    gradient = torch.ones_like(F.conv2d(x, w, None, stride=8, padding=2))
    assert not conv_error(_variance(x), GROUP, gradient, x.shape, x.stride(), kernel, options).any()
