"""Losses and statistics of inputs, against the same numbers computed one sample at a time by autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.collect.collector import Collector
from foveate.collect.inputs import InputStatistics
from foveate.collect.kinds import find_weights, patches, weight_matrix
from foveate.collect.objectives import Embedding, Logits
from foveate.formats.levels import INPUT_LEVELS
from foveate.kernels.planes.inputs import quantize_input
from foveate.nn.registry import registry_of
from tiny import generator, mlp, quantized_llama, rows


def _collector(model: nn.Module, batches: list[Any], objective: Any) -> Collector:
    collector = Collector(find_weights(model), objective)
    model.requires_grad_(False)
    for batch in batches:
        collector.add(model, batch)
    return collector


def _error(x_MK: Tensor, level: int) -> Tensor:
    codes, scale = quantize_input(x_MK, level)
    return codes * scale - x_MK


def test_losses_are_half_the_squared_change_of_each_row() -> None:
    model = mlp((40, 20, 5))
    (x,) = rows(9, 40, 1)
    node = _collector(model, [x], Logits()).by_module["0"].inputs
    assert node is not None
    leaf = x.clone().requires_grad_()
    loss, _ = Logits().loss(model(leaf), x, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, leaf)
    for i, level in enumerate(INPUT_LEVELS[:2]):
        expected = 0.5 * (gradient * _error(x, level)).sum(1).square().mean()
        assert float(node.losses(9)[0, i]) == pytest.approx(float(expected), rel=2e-3)
    assert float(node.losses(9)[0, 2]) == pytest.approx(float(node.losses(9)[0, 1]) / 256**2)
    assert float(node.losses(9)[0, 3]) == 0


def test_the_errors_of_16_bits_are_those_of_8_and_256_times_smaller() -> None:
    x = torch.randn(200, 300, generator=generator(8))
    ratio = float(_error(x, 8).double().square().mean() / _error(x.double().float(), 16).double().square().mean())
    assert ratio == pytest.approx(256**2, rel=0.05)


def test_of_many_values_some_samples_stand_for_all() -> None:
    model = mlp((64, 8, 3))
    x = torch.randn(1, 64, generator=generator(1)).repeat(70_000, 1)
    node = InputStatistics()
    gradient = torch.randn(1, 8, generator=generator(2)).repeat(70_000, 1)
    weight = weight_matrix(model[0])
    node.score(x[:, None], gradient[:, None], weight)
    one = InputStatistics()
    one.score(x[:1, None], gradient[:1, None], weight)
    assert node.losses(70_000)[0, 0] == pytest.approx(float(one.losses(1)[0, 0]), rel=1e-4)


def test_rows_of_zeros_cost_nothing() -> None:
    node = InputStatistics(independent_rows=True)
    x = torch.zeros(3, 2, 40)
    node.see(x, x)
    node.score(x, torch.ones(3, 2, 5), torch.ones(5, 40))
    assert node.losses(3).tolist() == [[0.0] * 4]
    assert float(node.summary(3)["variance"]) == 0


def test_rows_of_one_sample_are_summed_before_they_are_squared() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(40, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    model = Mean()
    x = torch.randn(6, 300, 40, generator=generator(3))  # more rows than are scored at a time
    node = _collector(model, [x], Embedding()).by_module["layer"].inputs
    assert node is not None
    leaf = x.clone().requires_grad_()
    loss, _ = Embedding().loss(model(leaf), x, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, leaf)
    for i, level in enumerate(INPUT_LEVELS[:2]):
        error = _error(x.reshape(-1, 40), level).view_as(x)
        expected = 0.5 * (gradient * error).sum((1, 2)).square().mean()
        assert float(node.losses(6)[0, i]) == pytest.approx(float(expected), rel=2e-3)


def test_a_convolution_is_scored_by_its_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.randn(5, 3, 6, 6)
    collector = _collector(model, [x], Logits())
    node = collector.by_module["0"].inputs
    assert node is not None
    conv = model[0]
    assert isinstance(conv, nn.Conv2d)
    y = conv(x).detach().requires_grad_()
    loss, _ = Logits().loss(model[1:](y), x, torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(loss, y)
    columns = patches(conv, x)[:, 0].transpose(1, 2)
    for i, level in enumerate(INPUT_LEVELS[:2]):
        change = _error(columns.reshape(-1, 27), level).view_as(columns) @ weight_matrix(conv).t()
        expected = 0.5 * (change * g.flatten(2).transpose(1, 2)).sum((1, 2)).square().mean()
        assert float(node.losses(5)[0, i]) == pytest.approx(float(expected), rel=2e-3)
    kept = node.summary(5)
    assert float(kept["values"]) == 36 * 27
    assert kept["range"].tolist() == [float(x.min()), float(x.max())]


def test_a_depthwise_convolution_reads_its_input_exactly() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(4 * 16, 4))
    node = _collector(model, [torch.randn(5, 4, 6, 6)], Logits()).by_module["0"].inputs
    assert node is not None
    assert node.losses(5).tolist() == [[0.0] * 4]


def test_moments_extremes_and_entropy() -> None:
    node = InputStatistics()
    parts = [torch.randn(50, 30, generator=generator(i)) * (i + 1) + i for i in range(3)]
    for part in parts:
        node.see(part, part)
    whole = torch.cat(parts).double()
    kept = node.summary(10)
    assert float(kept["mean"]) == pytest.approx(float(whole.mean()), rel=1e-5)
    assert float(kept["variance"]) == pytest.approx(float(whole.var(correction=0)), rel=1e-5)
    assert kept["range"].tolist() == pytest.approx([float(whole.min()), float(whole.max())])
    means, variances = [float(p.mean()) for p in parts], [float(p.var(correction=0)) for p in parts]
    expected = torch.tensor([[min(means), min(variances)], [max(means), max(variances)]])
    assert torch.allclose(kept["batch_moments"], expected, rtol=1e-5)
    assert float(kept["batch_values"]) == 1500
    assert 4 < float(kept["entropy"]) < 8


def test_entropy_of_a_coin_is_one_bit() -> None:
    node = InputStatistics()
    coin = torch.tensor([[1.0, 0.0] * 32]).repeat(8, 1)
    node.see(coin, coin)
    assert float(node.summary(1)["entropy"]) == pytest.approx(1.0)
    assert InputStatistics().summary(1) == {}


def test_a_profile_says_what_inputs_cost() -> None:
    _, profile = quantized_llama()
    for site in profile.input_sites():
        table = profile.losses[site.name]
        assert table.shape == (1, 4)
        assert float(table[0, 0]) > float(table[0, 1]) > float(table[0, 2]) > float(table[0, 3]) == 0
    plan = profile.uniform(4, 4)
    inputs = sum(float(profile.losses[s.name][0, 0]) for s in profile.input_sites())
    assert profile.predict(plan) - profile.predict(profile.uniform(4, 32)) == pytest.approx(inputs)
    assert math.isclose(profile.input_bits(plan), 4.25)


def test_collecting_goes_on_where_it_stopped() -> None:
    model = mlp().requires_grad_(False)
    batches = rows(64, batches=4)
    whole = _collector(model, batches, Logits())
    first = _collector(model, batches[:2], Logits())
    second = Collector(find_weights(model), Logits())
    second.restore({k: t.clone() for k, t in first.state().items()})
    for batch in batches[2:]:
        second.add(model, batch)
    for name, s in whole.by_module.items():
        other = second.by_module[name].inputs
        assert s.inputs is not None
        assert other is not None
        for key, t in s.inputs.tensors.items():
            assert torch.equal(t, other.tensors[key]), key


@torch.no_grad()
def test_static_scales_are_the_ranges_of_calibration() -> None:
    model = mlp()
    batches = rows()
    profile = fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    x = batches[0]
    wild = torch.where(x == x.max(), 100 * x, x)
    token = model(x)
    fv.use_static_scales(model)
    low, high = profile.statistics["0:input"]["range"].tolist()
    assert model[0].input_range.tolist() == [low, high]
    assert torch.equal(model(x), token)  # 16 bits, for weights at 8: a scale a row
    fv.apply(model, profile.uniform(8, 8))
    static, cut_off = model(x), model(wild)
    fv.use_static_scales(model, False)
    assert model[0].input_range.tolist() == [0, 0]
    assert not torch.equal(model(x), static)
    assert torch.allclose(model(x), static, atol=0.2)
    # a static scale cuts off what is beyond the range; each row's own does not
    assert float((model(wild) - static).abs().max()) > 5 * float((cut_off - static).abs().max())


def test_static_scales_need_ranges() -> None:
    model = mlp()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    registry_of(model).profile = replace(profile, statistics={})
    with pytest.raises(fv.FoveateError, match="no ranges of inputs"):
        fv.use_static_scales(model)
    with pytest.raises(fv.SiteError, match="inputs that the model does not have: nowhere:input"):
        registry_of(model).set_ranges({"nowhere:input": (0.0, 1.0)})


def test_inputs_losses_and_statistics_are_kept_in_the_folder(tmp_path: Path) -> None:
    model = mlp()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    fv.save(model, tmp_path)
    found = fv.load_profile(tmp_path)
    for site in profile.input_sites():
        assert torch.equal(found.losses[site.name], profile.losses[site.name])
        for key, t in profile.statistics[site.name].items():
            assert torch.equal(found.statistics[site.name][key], t)
    # a folder of foveate 0.1 has none
    old = replace(profile, losses={s.name: profile.losses[s.name] for s in profile.weight_sites()}, statistics={})
    registry_of(model).profile = old
    fv.save(model, tmp_path / "old")
    assert set(fv.load_profile(tmp_path / "old").losses) == set(old.losses)
    bad = {**profile.losses, "0:input": torch.zeros(2, 4)}
    registry_of(model).profile = replace(profile, losses=bad)
    fv.save(model, tmp_path / "bad")
    with pytest.raises(fv.CheckpointError, match="does not fit its sites"):
        fv.load_profile(tmp_path / "bad")
