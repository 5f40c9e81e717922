"""Smoothing moves outlier channels into the weights: the outputs are the same bit for bit, and inputs lose less."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.errors import DataError, WeightError
from tiny import llama, quantized_mlp, rows, tokens


def _with_outliers(model: nn.Module) -> nn.Module:
    """A few channels behind each norm 60 times as large, and what multiplies them as small."""
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            for norm, behind in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[3] *= 60
                for one in behind:
                    one.weight[:, 3] /= 60
    return model


def test_planted_outliers_go_and_nothing_else_changes() -> None:
    model = _with_outliers(llama())
    before = copy.deepcopy(model)
    report = fv.smooth(model, tokens(), progress=False)
    assert {(r.norm.rpartition(".")[2], len(r.layers)) for r in report if "layers." in r.norm} == {
        ("input_layernorm", 3),
        ("post_attention_layernorm", 2),
    }
    blocks = [r for r in report if "layers." in r.norm]
    assert len(blocks) == 4
    for r in blocks:
        assert r.strength > 0
        assert r.after < 0.5 * r.before
    batch = tokens(seed=7)[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before(**batch).logits)
    smoothed = fv.quantize(model, tokens(), progress=False)
    plain = fv.quantize(before, tokens(), progress=False)
    name = "model.layers.1.mlp.up_proj:input"
    assert float(smoothed.losses[name][0, 0]) < 0.5 * float(plain.losses[name][0, 0])
    # what was reported is what the profile says
    up = next(r for r in blocks if r.norm == "model.layers.1.post_attention_layernorm")
    got = sum(float(smoothed.losses[f"{n}:input"][0, 0]) for n in up.layers)
    assert got == pytest.approx(up.after, rel=1e-3)


class _Block(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second, self.what = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 8), what
        with torch.no_grad():
            self.norm.weight[2], self.norm.bias[5] = 100.0, 50.0
            self.first.weight[:, 2] /= 100

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = self.first(x)
        if self.what == "residual":
            y = y + x
        elif self.what == "twice":
            y = self.first(y)
        return self.second(torch.relu(y))


def test_what_goes_elsewhere_too_is_left_as_it_is() -> None:
    batches = rows(30, 16)
    for what, expected in (("plain", 1), ("residual", 0), ("twice", 0)):
        model = _Block(what)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        report = fv.smooth(model, batches, objective=fv.Logits(), level=8, progress=False)
        assert len(report) == expected, what
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert changed == ({"norm.weight", "norm.bias", "first.weight"} if expected else set())


def test_where_it_gains_nothing_nothing_is_done() -> None:
    model = llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = fv.smooth(model, tokens(), progress=False)
    assert any(not r.strength for r in report)
    for r in report:
        assert (r.strength == 0) == (r.after == r.before)
        if not r.strength:
            for name in (r.norm, *r.layers):
                assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


def test_a_norm_that_adds_one_to_its_weight_is_left() -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    from tiny import TRANSFORMER

    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**TRANSFORMER, head_dim=8)).eval()
    assert fv.smooth(model, tokens(), progress=False) == ()


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="no batches to smooth by"):
        fv.smooth(llama(), [], progress=False)
    with pytest.raises(WeightError, match="smooth first, then quantize"):
        fv.smooth(quantized_mlp()[0], rows(), progress=False)
    with pytest.raises(fv.LevelError):
        fv.smooth(llama(), tokens(), level=5, progress=False)
