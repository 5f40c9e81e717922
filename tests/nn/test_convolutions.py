"""Convolutions of every sort: quantized, measured, allocated, stored, and near the float ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.nn.modules import PlaneConv
from tiny import generator

Make = Callable[[], nn.Module]
KINDS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "2d": (lambda: nn.Conv2d(6, 20, 3, padding=1), (6, 9, 8)),
    "2d, 1x1": (lambda: nn.Conv2d(40, 24, 1), (40, 5, 6)),
    "2d, 1x1, strided, no bias": (lambda: nn.Conv2d(40, 24, 1, stride=2, bias=False), (40, 5, 6)),
    "2d, dilated": (lambda: nn.Conv2d(6, 20, 3, dilation=(2, 1), padding="same"), (6, 9, 8)),
    "2d, grouped": (lambda: nn.Conv2d(12, 24, 3, groups=3, stride=(1, 2)), (12, 9, 8)),
    "2d, grouped, 1x1": (lambda: nn.Conv2d(12, 24, 1, groups=3), (12, 5, 6)),
    "2d, depthwise": (lambda: nn.Conv2d(24, 24, 3, groups=24, padding=1), (24, 9, 8)),
    "2d, depthwise with two filters each": (lambda: nn.Conv2d(12, 24, (5, 3), groups=12, dilation=2), (12, 13, 9)),
    "2d, reflected": (lambda: nn.Conv2d(6, 20, (1, 5), padding=(0, 2), padding_mode="reflect"), (6, 9, 8)),
    "1d": (lambda: nn.Conv1d(6, 20, 5, stride=2, padding=3), (6, 30)),
    "1d, 1": (lambda: nn.Conv1d(40, 24, 1), (40, 11)),
    "1d, dilated, circular": (lambda: nn.Conv1d(6, 20, 3, dilation=4, padding=4, padding_mode="circular"), (6, 30)),
    "1d, grouped": (lambda: nn.Conv1d(12, 24, 3, groups=2), (12, 30)),
    "1d, depthwise": (lambda: nn.Conv1d(24, 24, 4, groups=24, padding=3), (24, 30)),
}


def _model(make: Make, shape: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    conv = make()
    width = conv(torch.zeros(1, *shape)).numel()
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(width, 10)).eval()


@pytest.mark.parametrize("what", KINDS)
def test_a_convolution(what: str, tmp_path: Path) -> None:
    make, shape = KINDS[what]
    model = _model(make, shape)
    original = copy.deepcopy(model)
    batches = list(torch.randn(24, *shape, generator=generator(1)).split(8))
    profile = fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    conv = model[0]
    assert isinstance(conv, PlaneConv)
    assert not [note for note in profile.notes if "fewer rows" not in note]
    site = next(s for s in profile.sites if s.name == "0:weight")
    assert (site.rows, site.columns) == (original[0].weight.shape[0], original[0].weight[0].numel())

    # near the float convolution at 8 bits, and nearer with each level
    x = torch.randn(4, *shape, generator=generator(2))
    errors = []
    with torch.no_grad():
        expected: Tensor = original[0](x)
        for level in (2, 3, 4, 6, 8):
            fv.apply(model, profile.uniform(level, 16))
            errors.append(float((conv(x) - expected).norm() / expected.norm()))
            assert conv(x).shape == expected.shape
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.015, errors
    assert errors[0] > 10 * errors[-1], errors

    # measured: every tile is worth something, less the more bits
    table = profile.losses["0:weight"]
    assert bool((table[:, 1:-1] >= table[:, 2:]).all())
    assert bool((table[:, 1] > 0).all())
    found = fv.audit(model, batches, sites="0:weight", levels=(3,), objective=fv.Logits(), progress=False)
    assert 0.4 < found.ratio < 2.5

    # allocated, kept and loaded
    plan = fv.allocate(profile, fv.Budget(bits=0.5 * (profile.uniform(3).bits + profile.uniform(6).bits)))
    fv.save(model, tmp_path / "out", keep=plan)
    again = fv.load(tmp_path / "out", model=_model(make, shape))
    fv.apply(model, plan)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        # a row does not depend on the batch it is in
        if conv.groups == 1:
            assert torch.equal(model(x[1:2]), model(x)[1:2])


def test_gradients_pass_through_a_grouped_convolution() -> None:
    make, shape = KINDS["2d, grouped"]
    model = _model(make, shape)
    original = copy.deepcopy(model)
    fv.quantize(model, [torch.randn(8, *shape)], objective=fv.Logits(), progress=False)
    gradients = []
    for m in (model, original):
        x = torch.randn(2, *shape, generator=generator(3)).requires_grad_()
        m(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()
