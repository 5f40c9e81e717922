"""Exact tiles: kept while quantizing, chosen by maps, read as such, saved, loaded, and given up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.formats.levels import EXACT_LEVELS
from foveate.nn.registry import registry_of
from foveate.precision.profiles import FITTED
from tiny import llama, mlp, quantized_mlp, resident_bytes, rows, tokens

X = torch.randn(9, 70, generator=torch.Generator().manual_seed(8))


def _exact_tiles(model: nn.Module) -> dict[str, int]:
    weights = registry_of(model).weights
    return {name: 0 if w.value.exact is None else len(w.value.exact.tiles) for name, w in weights.items()}


def _mixed(profile: fv.Profile, level: int = 3) -> fv.PrecisionMap:
    """Exact where tiles are kept exact, and a level of planes elsewhere."""
    plan = profile.uniform(level, 32)
    levels = dict(plan.levels)
    for site in profile.weight_sites():
        exact = profile.exact_levels(site.name)
        if exact is not None:
            levels[site.name] = bytes(torch.where(exact > 0, exact, level).tolist())
    return fv.PrecisionMap(plan.sites, levels, plan.other_bytes, other_parameters=plan.other_parameters)


@torch.no_grad()
def _read(model: nn.Module, x: Tensor = X) -> Tensor:
    out: Tensor = model(x)
    return out


@torch.no_grad()
def _round_weights(model: nn.Module) -> None:
    """Round weights, but not biases, to float16."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            parameter.copy_(parameter.half())


@pytest.mark.parametrize("level", EXACT_LEVELS)
def test_a_model_whose_tiles_are_all_exact_is_the_original(level: int) -> None:
    original = mlp()
    model, profile = quantized_mlp(exact=fv.KeepExact(share=1, level=level))
    fv.apply(model, profile.uniform(level, 32))
    if level == 16:
        _round_weights(original)
    expected = _read(original)
    assert torch.allclose(_read(model), expected, rtol=1e-5, atol=1e-6)
    assert profile.predict(profile.uniform(level, 32)) == 0
    fv.apply(model, profile.uniform(4))  # and its planes are still there
    assert not torch.allclose(_read(model), expected, rtol=1e-3)
    fv.dequantize(model)
    assert isinstance(model[0], nn.Linear)


def test_tiles_of_16_bit_models_keep_their_type() -> None:
    model = mlp().bfloat16()
    original = {name: p.detach().float() for name, p in model.named_parameters()}
    fv.quantize(model, [x.bfloat16() for x in rows()], objective=fv.Logits(), progress=False, exact=1.0)
    profile = fv.profile_of(model)
    fv.apply(model, profile.uniform(16))
    for name, weight in registry_of(model).weights.items():
        assert torch.equal(weight.dequantize(), original[name.replace(":weight", ".weight")])


def test_the_tiles_that_lose_most_are_kept() -> None:
    model, profile = quantized_mlp(exact=0.1)
    kept, left = [], []
    for site in profile.weight_sites():
        together = site.grid[1] if FITTED in profile.statistics[site.name] else 1  # whole strips of fitted codes
        losses = profile.losses[site.name][:, 2].view(-1, together).mean(1) / site.group  # at 3 bits
        exact = profile.exact_levels(site.name)
        mask = torch.zeros(len(losses), dtype=torch.bool)
        if exact is not None:
            assert bool(((exact.view(-1, together) > 0).sum(1) % together == 0).all())
            mask = exact.view(-1, together)[:, 0] > 0
        kept += losses[mask].tolist()
        left += losses[~mask].tolist()
    total = sum(site.tiles for site in profile.weight_sites())
    assert 0 < total / 10 <= sum(_exact_tiles(model).values()) < total / 10 + 4
    assert min(kept) >= max(left)


def test_maps_with_exact_tiles_say_their_bytes_and_lose_less(tmp_path: Path) -> None:
    model, profile = quantized_mlp(exact=0.2)
    plan = _mixed(profile)
    fv.apply(model, plan)
    assert profile.predict(plan) < profile.predict(profile.uniform(3, 32))
    assert "16" in repr(plan.counts(next(plan.weight_sites())))
    fv.save(model, tmp_path / "out", keep=plan)
    loaded = fv.load(tmp_path / "out", model=mlp())
    assert torch.equal(_read(loaded), _read(model))
    assert resident_bytes(loaded) == plan.bytes_resident
    # planes of exact tiles are gone, so anything between rounds up
    fv.apply(loaded, profile.uniform(2, 32))
    read = fv.current_map(loaded)
    assert {s.name: read.counts(s)[16] for s in read.weight_sites()} == _exact_tiles(loaded)
    with pytest.raises(fv.PlaneNotResidentError, match="at level 4"):
        fv.apply(loaded, profile.uniform(4))


def test_everything_is_saved_and_loaded(tmp_path: Path) -> None:
    model, profile = quantized_mlp(exact=0.3)
    fv.apply(model, profile.uniform(4))
    fv.save(model, tmp_path / "out")
    loaded = fv.load(tmp_path / "out", model=mlp())
    for plan in (profile.uniform(8), _mixed(profile), profile.uniform(2)):
        fv.apply(model, plan)
        fv.apply(loaded, plan)
        assert torch.equal(_read(loaded), _read(model))
    assert _exact_tiles(loaded) == _exact_tiles(model)
    assert torch.equal(
        _read(fv.load(tmp_path / "out", model=mlp(), keep=_mixed(profile))), _read_at(model, _mixed(profile))
    )
    fewer = fv.load(tmp_path / "out", model=mlp(), keep=3)
    assert not any(_exact_tiles(fewer).values())
    fv.save_map(tmp_path / "out", _mixed(profile))
    assert torch.equal(_read(fv.load(tmp_path / "out", model=mlp())), _read_at(model, _mixed(profile)))


def _read_at(model: nn.Module, plan: fv.PrecisionMap) -> Tensor:
    fv.apply(model, plan)
    return _read(model)


def test_a_state_holds_exact_tiles() -> None:
    model, profile = quantized_mlp(exact=0.3)
    fv.apply(model, profile.uniform(4))
    other = mlp(seed=3)
    fv.quantize(other, rows(seed=5), objective=fv.Logits(), progress=False, exact=0.3)
    fv.apply(other, profile.uniform(4))
    other.load_state_dict(model.state_dict())
    plan = _mixed(profile)
    assert torch.equal(_read_at(other, plan), _read_at(model, plan))
    fv.apply(other, profile.uniform(4))
    plain, _ = quantized_mlp()
    fv.apply(plain, profile.uniform(4))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(_read_at(plain, plan), _read_at(model, plan))
    bad = dict(model.state_dict())
    key = next(k for k in bad if k.endswith("exact_values"))
    for value in (bad[key][1:], torch.full_like(bad[key], torch.nan), bad[key].double()):
        with pytest.raises(fv.StateError, match="exact_values"):
            other.load_state_dict({**bad, key: value})
    tiles = key.replace("exact_values", "exact_tiles")
    with pytest.raises(fv.StateError, match="ascending"):
        other.load_state_dict({**bad, tiles: bad[tiles] + 1000})
    with pytest.raises(fv.StateError, match="only some"):
        other.load_state_dict({name: t for name, t in bad.items() if name != tiles})


def test_a_frontier_begins_with_exact_tiles(tmp_path: Path) -> None:
    model, profile = quantized_mlp(exact=0.3)
    chain = fv.frontier(profile, 12)
    first = chain[0]
    assert any(first.has_exact(site) for site in first.weight_sites())
    fv.apply(model, chain)
    fv.save(model, tmp_path / "out", frontier=chain)
    loaded = fv.load(tmp_path / "out", model=mlp())
    again = fv.load_frontier(tmp_path / "out")
    assert [dict(plan.levels) for plan in again] == [dict(plan.levels) for plan in chain]
    fv.apply(loaded, again)
    for index in range(len(chain)):
        fv.set_index(model, index)
        fv.set_index(loaded, index)
        assert torch.equal(_read(loaded), _read(model))


def test_exact_tiles_stay_in_memory_under_a_limit(tmp_path: Path) -> None:
    model, profile = quantized_mlp(exact=0.3)
    fv.save(model, tmp_path / "all")
    plan = _mixed(profile)
    fv.apply(model, plan)
    fv.save(model, tmp_path / "kept", keep=plan)
    for folder in ("all", "kept"):
        limited = fv.load(tmp_path / folder, model=mlp(), memory=10**8)
        fv.apply(limited, plan)
        fv.resize(limited, memory=10**8)
        registry_of(limited).fill()  # type: ignore[attr-defined]
        assert torch.equal(_read(limited), _read(model))
        fv.save(limited, tmp_path / f"again-{folder}")
        assert torch.equal(_read(fv.load(tmp_path / f"again-{folder}", model=mlp())), _read(model))


def test_rows_of_one_batch_read_exact_and_nested_tiles() -> None:
    model, profile = quantized_mlp(exact=0.3)
    exact, low = _mixed(profile), profile.uniform(3, 32)
    fv.apply(model, fv.Frontier((exact, low)))
    alone = [_read_at(model, plan) for plan in (exact, low)]
    fv.apply(model, fv.Frontier((exact, low)))
    with fv.row_precision(model, [fv.Request(tier=0), fv.Request(tier=1)] * 4 + [fv.Request(tier=0)]):
        mixed = _read(model)
    for row in range(9):
        assert torch.equal(mixed[row], alone[row % 2][row])


def test_a_fused_decoder_reads_exact_tiles() -> None:
    model = llama()
    ids = tokens(1)[0]["input_ids"]
    profile = fv.quantize(model, tokens(), progress=False, exact=0.5)
    plan = _mixed(profile).with_level("*:input", 16)
    fv.apply(model, plan)
    assert all(decoder.fused for decoder in fv.backends(model))
    with torch.no_grad():
        fused = model(ids).logits
        fv.unfuse(model)
        assert torch.allclose(model(ids).logits, fused, rtol=1e-4, atol=1e-5)


def test_gradients_go_through_exact_tiles() -> None:
    model, profile = quantized_mlp(exact=1.0)
    fv.apply(model, profile.uniform(16, 32))
    original = mlp()
    _round_weights(original)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(x).square().sum().backward()
    original(y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan"), True, "all"])
def test_what_is_no_share_is_refused(share: object) -> None:
    with pytest.raises(fv.BudgetError, match="share of tiles"):
        fv.quantize(mlp(), rows(), exact=share)  # type: ignore[arg-type]


def test_what_is_no_exact_level_is_refused() -> None:
    with pytest.raises(fv.BudgetError, match="not one of 16, 32"):
        fv.KeepExact(share=0.1, level=8)
    model, profile = quantized_mlp()
    with pytest.raises(fv.PlaneNotResidentError, match="at level 16"):
        fv.apply(model, profile.uniform(16))
