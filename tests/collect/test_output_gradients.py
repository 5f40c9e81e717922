"""The covariance of outputs' gradients against autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveate.collect.collector import Collector
from foveate.collect.kinds import find_weights
from foveate.collect.objectives import Logits
from tiny import generator, mlp, rows


def _loss(output: Tensor, batch: Tensor) -> Tensor:
    return Logits().loss(output, batch, torch.Generator().manual_seed(0))[0]


def _collected_gradients(model: nn.Module, x: Tensor) -> Collector:
    collector = Collector(find_weights(model), Logits())
    model.requires_grad_(False)
    collector.add(model, x)
    return collector


@pytest.mark.parametrize("block_size", [512, 3])
def test_the_covariance_is_kept_in_blocks_of_outputs(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.collect.statistics.COVARIANCE_BLOCK", block_size)
    model = mlp((6, 5, 4))
    (x,) = rows(40, 6, 1)
    collector = _collected_gradients(model, x)
    a = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(_loss(model[2](torch.relu(a)), x), a)
    kept = collector.by_module["0"].gradients()
    assert kept is not None
    size = min(block_size, 5)
    for block, part in zip(kept, g.split(size, 1), strict=True):
        width = part.shape[1]
        assert torch.allclose(block[:width, :width], part.t() @ part / 40, rtol=1e-4, atol=1e-7)
        assert not block[width:].any()


def test_gradients_of_a_convolution_are_of_its_positions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    x = torch.randn(6, 2, 6, 6, generator=generator(0))
    kept = _collected_gradients(model, x).by_module["0"].gradients()
    a = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(_loss(model[2](a.flatten(1)), x), a)
    g_TN = g.permute(0, 2, 3, 1).flatten(0, 2)
    assert kept is not None
    assert torch.allclose(kept[0], g_TN.t() @ g_TN / len(g_TN), rtol=1e-4, atol=1e-7)


def test_gradients_of_too_few_rows_or_of_a_vocabulary_are_not_used() -> None:
    model = mlp((6, 5, 4, 40))
    collector = _collected_gradients(model, rows(39, 6, 1)[0])
    assert collector.by_module["0"].gradients() is None  # 39 rows, 5 outputs
    assert collector.by_module["2"].gradients() is not None
    assert "gradients_BRR" not in collector.by_module["4"].tensors  # 40 outputs of 4 inputs
