"""Weights that are read outside of their modules stay float, and a model that fails on planes gets its modules back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveate as fv
from foveate.collect.kinds import find_weights
from foveate.collect.reads import Reads
from foveate.errors import WeightError
from foveate.nn.modules import PlaneLinear
from tiny import llama, rows, tokens

Use = Callable[[nn.Linear, Tensor], Tensor]


class _Net(nn.Module):
    """`use` does what it likes with the layer in the middle."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(70, 40), nn.Linear(40, 40), nn.Linear(40, 10)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.use(self.middle, self.first(x).relu()))
        return y


PAST: dict[str, tuple[Use, str]] = {
    "transposed": (lambda layer, x: x @ layer.weight.t(), "t in _Net"),
    "functional": (lambda layer, x: F.linear(x, layer.weight, layer.bias), "linear in _Net"),
    "a keyword": (lambda layer, x: F.linear(x, weight=layer.weight), "linear in _Net"),
    "in a list": (lambda layer, x: x @ torch.cat([layer.weight, layer.weight])[:40], "cat in _Net"),
    "a norm beside its use": (lambda layer, x: layer(x) / layer.weight.norm(), "norm in _Net"),
    "its data": (lambda layer, x: x @ layer.weight.data, "data in _Net"),
    "its dimensions": (lambda layer, x: layer(x) * layer.weight.ndim, "ndim in _Net"),
    "without gradients": (lambda layer, x: layer(x) * _plain_norm(layer), "norm in _Net"),
}


@torch.no_grad()
def _plain_norm(layer: nn.Linear) -> Tensor:
    return layer.weight.norm()


@pytest.mark.parametrize("what", PAST)
def test_a_weight_that_is_read_past_its_module_stays(what: str) -> None:
    use, who = PAST[what]
    model = _Net(use).eval()
    weight, x = model.middle.weight, rows()[0]
    with torch.no_grad():
        expected = model(x)
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    assert [s.name for s in profile.weight_sites()] == ["first:weight", "last:weight"]
    assert model.middle.weight is weight
    assert (
        f"the weights of middle stay float: other code than their modules' reads them, such as {who}" in profile.notes
    )
    with torch.no_grad():
        assert float((model(x) - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, x: layer(x).to(layer.weight.dtype),
        lambda layer, x: layer(x).to(layer.weight.device)[:, : layer.weight.shape[0]],
        lambda layer, x: layer.forward(x),
    ],
)
def test_what_planes_answer_is_no_read(use: Use) -> None:
    model = _Net(use)
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    assert isinstance(model.middle, PlaneLinear)
    assert not any("stay float: other" in note for note in profile.notes)
    model(rows()[0])


def test_reads_that_only_a_later_batch_shows() -> None:
    def use(layer: nn.Linear, x: Tensor) -> Tensor:
        return x @ layer.weight.t() if len(x) < 32 else layer(x)

    model = _Net(use)
    batches = [*rows(), rows()[0][:5]]
    profile = fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    assert [s.name for s in profile.weight_sites()] == ["first:weight", "last:weight"]
    for batch in batches:
        model(batch)


def test_the_same_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.calibrate.passes import calibration
    from foveate.calibrate.schedule import Schedule, cut

    monkeypatch.setattr(calibration, "make_schedule", lambda costs, *_: Schedule(False, cut(costs, 3), True, 0))
    model = _Net(PAST["transposed"][0])
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    assert [s.name for s in profile.weight_sites()] == ["first:weight", "last:weight"]
    assert not model.middle.weight.is_meta
    model(rows()[0])


def test_reads_in_compiled_parts() -> None:
    model = _Net(torch.compile(PAST["transposed"][0], backend="eager")).requires_grad_(False)
    model(rows()[0])  # compiled already
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    assert [s.name for s in profile.weight_sites()] == ["first:weight", "last:weight"]
    model(rows()[0])


def test_a_hook_that_reads_the_weight() -> None:
    model = _Net(lambda layer, x: layer(x))
    model.middle.register_forward_hook(lambda layer, args, y: y / layer.weight.abs().max())
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    assert [s.name for s in profile.weight_sites()] == ["first:weight", "last:weight"]


def test_a_loss_may_read_weights() -> None:
    """It is run while calibrating only."""
    model = _Net(lambda layer, x: layer(x))

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.square().sum() + 0 * model.middle.weight.detach().norm()

    profile = fv.quantize(model, rows(), objective=fv.Logits(), loss=loss, progress=False)
    assert len(profile.weight_sites()) == 3


def test_weights_that_hooks_make_anew_and_forwards_of_objects_are_left() -> None:
    model = _Net(lambda layer, x: layer(x))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.middle)
    model.first.forward = lambda x: F.linear(x, model.first.weight) * 3  # type: ignore[method-assign]
    x = rows()[0]
    expected = model(x).detach()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    assert [s.name for s in profile.weight_sites()] == ["last:weight"]
    assert float((model(x).detach() - expected).norm() / expected.norm()) < 0.02


def test_all_weights_read_past_their_modules() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(70, 10)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer.weight.t()

    model = Only()
    with pytest.raises(WeightError, match="no weight can be quantized: the weights of layer stay float"):
        fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    model(rows()[0])


def _asks_for_features(layer: nn.Linear, x: Tensor) -> Tensor:
    if not isinstance(layer, nn.Linear):
        raise TypeError("not a linear layer")
    y: Tensor = layer(x)
    return y


def test_a_model_that_cannot_run_on_planes_is_left_as_it_was() -> None:
    model = _Net(_asks_for_features)
    x, before = rows()[0], dict(model.named_parameters())
    expected = model(x)
    with pytest.raises(WeightError, match=r"does not run on planes: _Net: not a linear layer.*skip; it is as it was"):
        fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert torch.equal(model(x), expected)
    fv.quantize(model, rows(), objective=fv.Logits(), skip="middle", progress=False)
    model(x)


def test_a_model_that_fails_on_planes_while_levels_are_measured_is_left_as_it_was() -> None:
    calls = [0]

    def use(layer: nn.Linear, x: Tensor) -> Tensor:
        calls[0] += not isinstance(layer, nn.Linear)
        if calls[0] > 3:
            raise RuntimeError("enough")
        y: Tensor = layer(x)
        return y

    model = _Net(use)
    with pytest.raises(WeightError, match="does not run on planes: _Net: enough"):
        fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    assert isinstance(model.middle, nn.Linear)


def test_where_float_weights_had_to_make_room_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.calibrate.passes import calibration
    from foveate.calibrate.schedule import Schedule, cut

    monkeypatch.setattr(calibration, "make_schedule", lambda costs, *_: Schedule(False, cut(costs, 1), True, 0))
    model = _Net(_asks_for_features)
    with pytest.raises(WeightError, match=r"float weights of first, middle, last had to make room.*load it again"):
        fv.quantize(model, rows(), objective=fv.Logits(), progress=False)


def test_what_only_generation_reads_is_seen() -> None:
    model = llama()
    layer = model.model.layers[0].self_attn
    forward = type(layer).forward

    class Attention(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden_states.shape[1] == 1:  # as Mamba has it: one token, with a cache
                self.o_proj.weight.sum()
            return forward(self, hidden_states, *args, **kwargs)

    layer.__class__ = Attention
    profile = fv.quantize(model, tokens(), progress=False)
    left = "the weights of model.layers.0.self_attn.o_proj stay float"
    assert any(note.startswith(left) and "sum in model.layers.0.self_attn" in note for note in profile.notes)
    model.generate(tokens()[0]["input_ids"], max_new_tokens=3, do_sample=False)


def test_a_model_whose_generation_fails_is_quantized_with_a_note() -> None:
    model = llama()
    model.generate = lambda **_: 1 / 0
    profile = fv.quantize(model, tokens(), progress=False)
    assert any("what generation reads past modules is not known" in note for note in profile.notes)


def test_reads_name_the_module_that_reads() -> None:
    inner = _Net(PAST["transposed"][0])
    model = nn.Sequential(nn.Linear(70, 70), inner)
    reads = Reads(model, find_weights(model))
    with reads.watching():
        model(rows()[0])
    assert reads.past == {"1.middle": "t in 1"}
    assert [entry.names[0] for entry in reads.only_own(find_weights(model))] == ["0", "1.first", "1.last"]
