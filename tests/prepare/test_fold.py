"""BatchNorm is folded into the layer before it exactly where that changes no output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.errors import CheckpointError, WeightError


def _shaken(model: nn.Module) -> nn.Module:
    """Norms that have seen data, and scale and shift it."""
    torch.manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3.0)
            if m.affine:
                nn.init.uniform_(m.weight, -2, 2)
                nn.init.normal_(m.bias)
    return model.eval()


def _same(model: nn.Module, x: Tensor, folded: tuple[str, ...]) -> None:
    original = copy.deepcopy(model)
    assert fv.fold_batchnorm(model, x) == folded
    for name in folded:
        assert type(model.get_submodule(name)) is nn.Identity
    other = torch.randn_like(x)
    with torch.no_grad():
        assert torch.allclose(model(other), original(other), rtol=1e-4, atol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)), (2, 3, 7, 7)),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 3, 7, 7)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), (2, 4, 7, 7)),
    "grouped, dilated": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2, padding_mode="reflect"), nn.BatchNorm2d(8)
        ),
        (2, 4, 7, 7),
    ),
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3, bias=False), nn.BatchNorm1d(8)), (2, 3, 9)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), (6, 5)),
    "not affine": (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False)), (6, 5)),
}


@pytest.mark.parametrize("what", FOLDED)
def test_a_norm_after_a_layer_is_folded(what: str) -> None:
    make, shape = FOLDED[what]
    _same(_shaken(make()), torch.randn(shape), ("1",))


class _Flow(nn.Module):
    """A layer and a norm, used in some way."""

    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def _both(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y


def _changed_in_place(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x).relu_())


def _a_view(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)[:, :, 1:])


def _without_the_norm(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.conv(x)
    return y


NOT_FOLDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the output goes elsewhere too": _both,
    "the output is changed first": _changed_in_place,
    "a part of it": _a_view,
    "the norm is not used": _without_the_norm,
    "the layer twice": lambda m, x: m.norm(m.conv(m.conv(x))),
    "the norm twice": lambda m, x: m.norm(m.norm(m.conv(x))),
    "the norm first": lambda m, x: m.conv(m.norm(x)),
}


@pytest.mark.parametrize("what", NOT_FOLDED)
def test_anything_else_is_left(what: str) -> None:
    model = _shaken(_Flow(NOT_FOLDED[what]))
    _same(model, torch.randn(2, 4, 7, 7), ())
    assert type(model.norm) is nn.BatchNorm2d


def test_an_output_that_the_model_also_returns_is_left() -> None:
    def use(m: Any, x: Tensor) -> dict[str, Tensor]:
        y = m.conv(x)
        return {"norm": m.norm(y), "raw": y}

    assert fv.fold_batchnorm(_shaken(_Flow(use)), torch.randn(2, 4, 7, 7)) == ()


def test_shared_weights_and_norms_without_statistics_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    _same(_shaken(model), torch.randn(2, 4, 3, 3), ())
    without = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert fv.fold_batchnorm(without.eval(), torch.randn(2, 4, 3, 3)) == ()
    # over [B, T, N] the norm's channels are T, not the layer's outputs
    tall = _shaken(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)))
    _same(tall, torch.randn(2, 8, 5), ())


def test_a_hook_on_the_layer_keeps_it() -> None:
    model = _shaken(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    assert fv.fold_batchnorm(model, torch.randn(2, 4, 3, 3)) == ()


def test_training_mode_and_quantized_models_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    weight = model[0].weight.detach().clone()
    with pytest.raises(WeightError, match="Sequential is in training mode"):
        fv.fold_batchnorm(model, torch.randn(2, 4, 3, 3))
    model.eval()
    model[1].train()
    with pytest.raises(WeightError, match="1 is in training mode"):
        fv.fold_batchnorm(model, torch.randn(2, 4, 3, 3))
    assert torch.equal(model[0].weight, weight)
    model.eval()
    fv.quantize(model, [torch.randn(2, 4, 3, 3)], progress=False)
    with pytest.raises(WeightError, match="quantized already"):
        fv.fold_batchnorm(model, torch.randn(2, 4, 3, 3))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 25, 10),
    )  # fmt: skip


def test_folded_quantized_saved_and_loaded_into_a_skeleton_that_is_not_folded(tmp_path: Path) -> None:
    model = _shaken(_net())
    original = copy.deepcopy(model)
    batches = list(torch.randn(8, 3, 9, 9).split(4))
    assert fv.fold_batchnorm(model, batches[0]) == ("1", "4")
    profile = fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    with torch.no_grad():
        expected = original(batches[0])
        fv.apply(model, profile.uniform(8, 16))
        assert (model(batches[0]) - expected).norm() < 0.02 * expected.norm()
        fv.save(model, tmp_path / "out")
        with torch.device("meta"):
            skeleton = _net()
        again = fv.load(tmp_path / "out", model=skeleton)
        assert torch.equal(again(batches[0]), model(batches[0]))
        # and once more, from what was loaded, into one that is folded already
        fv.save(again, tmp_path / "again")
        folded = _shaken(_net())
        fv.fold_batchnorm(folded, batches[0])
        assert torch.equal(fv.load(tmp_path / "again", model=folded)(batches[0]), model(batches[0]))
    with pytest.raises(CheckpointError, match="norms folded that the model does not have"):
        fv.load(tmp_path / "out", model=nn.Sequential(nn.Linear(3, 4)))


def test_an_empty_batch_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(fv.FoveateError, match="the batch is empty"):
        fv.fold_batchnorm(model, torch.zeros(0, 3, 8, 8))


class _Reads(nn.Module):
    """Uses the weight of its convolution a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)
        return y


def test_a_weight_that_is_read_elsewhere_is_left() -> None:
    assert fv.fold_batchnorm(_shaken(_Reads()), torch.randn(2, 3, 5, 5)) == ()


def test_without_a_batch_dimension_channels_are_not_told() -> None:
    model = _shaken(nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6)))
    assert fv.fold_batchnorm(model, torch.randn(3, 6)) == ()


def test_an_output_that_hides_its_tensors_is_refused() -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return type("Box", (), {"values": (y, self.norm(y))})()

    with pytest.raises(fv.FoveateError, match="hides its tensors"):
        fv.fold_batchnorm(Hiding().eval(), torch.randn(2, 3, 5, 5))
