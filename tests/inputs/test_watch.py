"""The watch on live models: what it raises, what it leaves alone, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.inputs import Change, Tolerance
from foveate.nn.registry import registry_of
from tiny import mlp, quantized_llama, rows, tokens


def _model() -> tuple[nn.Sequential, fv.Profile]:
    model = mlp()
    profile = fv.quantize(model, rows(512, batches=8), objective=fv.Logits(), progress=False)
    fv.apply(model, profile.uniform(8, 4))
    return model, profile


def _clean(seed: int = 5, batches: int = 10) -> list[Tensor]:
    return rows(64 * batches, batches=batches, seed=seed)


def test_clean_data_change_nothing() -> None:
    model, _ = _model()
    fv.use_static_scales(model)
    before = fv.current_map(model)
    ranges = registry_of(model).ranges
    with fv.watch_inputs(model) as watch:
        for x in _clean():
            model(x)
        assert watch.changes == []
        assert watch.calls == 10
        assert fv.current_map(model) is before
    assert registry_of(model).ranges == ranges


def test_a_shift_raises_and_coming_back_lowers() -> None:
    model, _ = _model()
    fv.use_static_scales(model)
    heard: list[Change] = []
    with fv.watch_inputs(model, on_change=heard.append) as watch:
        for x in _clean():
            model(4 * x)
        now = fv.current_map(model).levels
        assert now["0:input"] == 16
        assert registry_of(model).ranges == {}
        assert watch.raised["0:input"] == 16
        assert watch.drift["0:input"] > 3
        first = watch.changes[0]
        assert (first.site, first.before, first.call) == ("0:input", 4, 0)
        assert "0:input from 4 to 16 bits" in str(watch)
        for x in _clean(6, 60):
            model(x)
        assert watch.raised == {}
        assert len(registry_of(model).ranges) == 3
        assert {fv.current_map(model).levels[f"{i}:input"] for i in (0, 2, 4)} == {4}
    assert heard == watch.changes


def test_only_the_node_that_drifts_is_raised() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(40, 20), nn.Linear(40, 20)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(y)], 1)

    model = Two()
    pairs = list(zip(rows(512, 40, 8, seed=2), rows(512, 40, 8, seed=3), strict=True))
    profile = fv.quantize(model, pairs, objective=fv.Logits(), progress=False)
    fv.apply(model, profile.uniform(8, 8))
    with fv.watch_inputs(model) as watch:
        for x, y in pairs:
            model(x, 1.4 * y)
        assert watch.raised == {"b:input": 16}


def test_static_scales_lose_on_a_shift_and_the_watch_wins_it_back() -> None:
    model, profile = _model()
    shifted = [5 * x for x in _clean(7, 20)]
    fv.apply(model, profile.uniform(8, 32))
    exact = [model(x).detach() for x in shifted]

    @torch.no_grad()
    def lost(watched: bool) -> float:
        fv.apply(model, profile.uniform(8, 8))
        fv.use_static_scales(model)
        watch = fv.watch_inputs(model) if watched else None
        total = sum(float((model(x) - y).square().sum()) for x, y in zip(shifted, exact, strict=True))
        if watch is not None:
            watch.close()
        return total

    assert lost(True) < 0.1 * lost(False)


def test_closing_puts_everything_back() -> None:
    model, _ = _model()
    fv.use_static_scales(model)
    before, ranges = fv.current_map(model), registry_of(model).ranges
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    watch = fv.watch_inputs(model)
    model(10 * _clean()[0])
    assert fv.current_map(model) != before
    watch.close()
    assert fv.current_map(model) == before
    assert registry_of(model).ranges == ranges
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_a_map_applied_meanwhile_is_the_new_base() -> None:
    model, profile = _model()
    with fv.watch_inputs(model):
        model(4 * _clean()[0])
        other = profile.uniform(6, 8)
        fv.apply(model, other)
        model(4 * _clean()[1])
        now = fv.current_map(model)
        assert now.levels["0:weight"] == 6
        assert now.levels["0:input"] == 16
    assert fv.current_map(model) == other


def test_every_so_many_calls() -> None:
    model, _ = _model()
    with fv.watch_inputs(model, every=4) as watch:
        model(_clean()[0])
        for x in _clean()[1:4]:
            model(9 * x)
        assert watch.changes == []
        model(9 * _clean()[4])
        assert watch.changes


def test_a_language_model_with_shared_inputs() -> None:
    model, profile = quantized_llama()
    fv.apply(model, profile.uniform(8, 8))
    with fv.watch_inputs(model, tolerance=Tolerance(near=1e9, far=1e9, beyond=1.0)) as watch, torch.no_grad():
        for batch in tokens():
            model(**batch)
        assert watch.changes == []
        assert len(watch.drift) == len(profile.input_sites())


def test_what_is_refused() -> None:
    model, _ = _model()
    with pytest.raises(fv.FoveateError, match=r"every \(=0\) must be at least 1"):
        fv.watch_inputs(model, every=0)
    with pytest.raises(fv.FoveateError, match="not quantized"):
        fv.watch_inputs(mlp())


def test_compiled_calls_are_not_watched_and_compile_whole() -> None:
    model, _ = _model()
    with fv.watch_inputs(model) as watch, torch.no_grad():
        x = _clean()[0]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        assert watch.calls == 1
    torch._dynamo.reset()


def test_its_own_map_applied_again_is_not_a_new_base() -> None:
    model, profile = _model()
    base = profile.uniform(4)
    fv.apply(model, base)
    watch = fv.watch_inputs(model)
    with torch.no_grad():
        for _ in range(30):
            model(5 * _clean()[0])
        assert watch.raised
        levels = dict(watch.raised)
        for _ in range(3):
            fv.apply(model, fv.current_map(model))
            model(5 * _clean()[0])
        assert watch.raised == levels
    watch.close()
    assert fv.current_map(model) == base
    fv.use_static_scales(model)
    kept = registry_of(model).ranges
    watch.close()
    assert registry_of(model).ranges == kept
