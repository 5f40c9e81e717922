"""Perturbation: one site lowered at a time, measured, beside what the profile predicted."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.errors import DataError, FoveateError, LevelError, SiteError
from foveate.formats.levels import WEIGHT_LEVELS
from tiny import mlp, quantized_llama, rows, tokens


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, fv.Profile]:
    return quantized_llama()


def test_each_entry_is_the_divergence_of_that_site_alone(llama: tuple[nn.Module, fv.Profile]) -> None:
    model, profile = llama
    before = fv.current_map(model)
    held_out = tokens(seed=5)
    found = fv.audit(model, held_out, sites="*.mlp.*:weight", levels=(2, 4), progress=False)
    names = [s.name for s in profile.weight_sites() if ".mlp." in s.name]
    assert [(e.site, e.level) for e in found.entries] == [(n, level) for n in names for level in (2, 4)]
    assert fv.current_map(model) == before
    assert (found.samples, found.unit) == (48, "KL, nats")

    # by hand: a copy with one layer at 2 bits, the rest at 8
    entry = found.entries[2]
    top = profile.uniform(8)
    lowered = top.with_level(entry.site, 2)
    divergences = []
    with torch.no_grad():
        for batch in held_out:
            logits = []
            for plan in (top, lowered):
                fv.apply(model, plan)
                logits.append(model(**batch).logits.log_softmax(-1))
            divergences.append((logits[0].exp() * (logits[0] - logits[1])).sum(-1).flatten())
    fv.apply(model, before)
    assert entry.measured == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    alone = dataclasses.replace(profile, measured_over_summed=(1.0,) * 6)
    assert entry.predicted == pytest.approx(alone.predict(lowered) - alone.predict(top))
    assert entry.ratio == pytest.approx(entry.measured / entry.predicted)


def test_what_is_measured_confirms_what_was_predicted() -> None:
    model = mlp((70, 64, 32, 10))
    profile = fv.quantize(model, rows(512, seed=1), objective=fv.Logits(), progress=False)
    found = fv.audit(model, rows(512, seed=2), levels=(2, 3, 4), objective=fv.Logits(), progress=False)
    assert len(found.entries) == 9
    assert 0.7 < found.ratio < 1.4
    for e in found.entries:
        assert 0.4 < e.ratio < 2.5, e
    by_site = {e.site: [x.measured for x in found.entries if x.site == e.site] for e in found.entries}
    assert all(values == sorted(values, reverse=True) for values in by_site.values())
    text = str(found)
    assert text.splitlines()[0].split() == [
        "site",
        "level",
        "predicted",
        "measured",
        "+-",
        "measured",
        "/",
        "predicted",
    ]
    assert len(text.splitlines()) == 9 + 2
    assert "1024 samples" not in text
    assert "512 samples" in text

    corrected = found.corrected(profile)
    for e in found.entries:
        column = WEIGHT_LEVELS.index(e.level)
        new, old = corrected.losses[e.site][:, column], profile.losses[e.site][:, column]
        assert float(new.sum()) == pytest.approx(e.measured, rel=1e-4)
        # tiles keep their shares
        assert torch.allclose(new / new.sum(), old / old.sum())
    # at 6 bits, which were not measured, as at 4
    for name, table in corrected.losses.items():
        if name.endswith(":weight"):
            four, six = (
                table[:, WEIGHT_LEVELS.index(i)] / profile.losses[name][:, WEIGHT_LEVELS.index(i)] for i in (4, 6)
            )
            assert torch.allclose(four, six)
    assert corrected.notes[-1] == "the losses of 3 sites are those measured by perturbation, on 512 samples"
    assert fv.allocate(corrected, fv.Budget(bits=6)).bits <= 6


def test_inputs_are_sites_too() -> None:
    model = mlp()
    fv.quantize(model, rows(256), objective=fv.Logits(), progress=False)
    found = fv.audit(model, rows(256, seed=3), sites=["0:input", "2:input"], levels=(4, 8), progress=False)
    assert [(e.site, e.level) for e in found.entries] == [
        ("0:input", 4),
        ("0:input", 8),
        ("2:input", 4),
        ("2:input", 8),
    ]
    for four, eight in (found.entries[:2], found.entries[2:]):
        assert four.measured > 20 * eight.measured > 0


def test_a_site_that_was_worth_nothing_gets_what_was_measured() -> None:
    model = mlp()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    blind = dataclasses.replace(
        profile, losses={n: torch.zeros_like(t) if n == "2:weight" else t for n, t in profile.losses.items()}
    )
    found = fv.audit(model, rows(), sites="2:weight", levels=(3,), progress=False)
    corrected = found.corrected(blind)
    column = WEIGHT_LEVELS.index(3)
    assert float(corrected.losses["2:weight"][:, column].sum()) == pytest.approx(found.entries[0].measured)
    assert float(corrected.losses["2:weight"].sum()) == pytest.approx(found.entries[0].measured)


def test_refusals(llama: tuple[nn.Module, fv.Profile]) -> None:
    model, profile = llama
    with pytest.raises(SiteError, match="pattern 'nothing' matches none"):
        fv.audit(model, tokens(), sites="nothing", progress=False)
    with pytest.raises(LevelError, match=r"level \(=5\) is not one of"):
        fv.audit(model, tokens(), levels=(5,), progress=False)
    with pytest.raises(LevelError, match=r"none of the .* sites named can be lowered to 8"):
        fv.audit(model, tokens(), levels=(8,), progress=False)
    with pytest.raises(FoveateError, match="sites is empty"):
        fv.audit(model, tokens(), sites=(), progress=False)
    with pytest.raises(DataError, match="no batches"):
        fv.audit(model, [], progress=False)
    with pytest.raises(FoveateError, match="not quantized"):
        fv.audit(mlp(), rows(), progress=False)
    other = fv.quantize(mlp(), rows(), progress=False)
    found = fv.audit(model, tokens(), sites="*.q_proj:weight", progress=False)
    with pytest.raises(SiteError):
        found.corrected(other)
    assert fv.current_map(model) == profile.uniform(8)


def test_the_ratio_of_nothing_is_not_a_number() -> None:
    assert math.isnan(fv.Perturbation("a", 3, 0.0, 1.0, 0.1).ratio)
    assert math.isnan(fv.Audit((), 0, "KL, nats").ratio)


def test_noise_over_noise_is_no_ratio() -> None:
    noise, real = fv.Perturbation("a", 8, 1e-9, 3e-9, 1e-9), fv.Perturbation("b", 3, 0.01, 0.02, 0.001)
    assert math.isnan(noise.ratio)
    found = fv.Audit((noise, real), 50, "KL, nats")
    assert found.ratio == pytest.approx(2)
    assert "both at the floor of float32" in str(found).splitlines()[1]
    assert str(found).splitlines()[2].endswith("  2.00")
    assert fv.Perturbation("c", 6, 3e-7, -8e-9, 1e-9).ratio == 0  # a negative divergence is rounding
    assert str(fv.Audit((noise,), 50, "KL, nats")).endswith("geometric mean: not known")


def test_experts_are_audited_one_by_one() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = copy.deepcopy(transformers.MixtralForCausalLM(config).eval())
    fv.quantize(model, tokens(8, 16), progress=False)
    found = fv.audit(model, tokens(8, 16, seed=2), sites="*.experts.*.down_proj:weight", levels=(2,), progress=False)
    assert len(found.entries) == 4
    assert all(e.measured > 0 for e in found.entries)
