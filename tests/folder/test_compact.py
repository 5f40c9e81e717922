"""Planes that are dropped in a live model: the same results to the bit, fewer bytes, and nothing above comes back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.errors import FoveateError, LevelError, PlaneNotResidentError, SiteError
from foveate.nn.registry import registry_of
from foveate.precision.maps import PrecisionMap
from tiny import generator, mlp, quantized_llama, rows, tokens

X = torch.randn(9, 70, generator=generator(3))


@pytest.fixture
def made() -> tuple[nn.Module, fv.Profile]:
    model = mlp()
    return model, fv.quantize(model, rows(), objective=fv.Logits(), progress=False)


def _mixed(profile: fv.Profile) -> PrecisionMap:
    return fv.allocate(profile, fv.Budget(bits=4.8), fv.Constraints(levels=(0, 2, 3, 4, 6, 8)))


def _stored(model: nn.Module) -> int:
    return sum(w.value.nbytes() for w in registry_of(model).weights.values())


def test_the_same_numbers_in_fewer_bytes(made: tuple[nn.Module, fv.Profile], tmp_path: Path) -> None:
    model, profile = made
    plan = _mixed(profile)
    fv.apply(model, plan)
    before, size = model(X), _stored(model)
    given = fv.compact(model)
    assert torch.equal(model(X), before)
    assert given == size - _stored(model) > 0
    assert fv.current_map(model).levels == plan.levels
    assert fv.compact(model) == 0  # nothing is left to drop
    assert torch.equal(model(X), before)
    with pytest.raises(PlaneNotResidentError):
        fv.apply(model, profile.uniform(8))
    assert torch.equal(model(X), before)
    # what is stored is what a folder stores of this map
    fv.save(model, tmp_path / "out")
    fresh = mlp()
    fv.quantize(fresh, rows(), objective=fv.Logits(), progress=False)
    fv.save(fresh, tmp_path / "whole", keep=plan)
    for name, weight in registry_of(fv.load(tmp_path / "whole", model=mlp())).weights.items():
        mine = registry_of(model).weights[name].value
        assert all(torch.equal(a, b) for a, b in zip(mine.planes, weight.value.planes, strict=True))
        assert torch.equal(mine.stored_levels, weight.value.stored_levels)
    assert torch.equal(fv.load(tmp_path / "out", model=mlp())(X), before)


def test_zeroed_tiles_are_dropped_whole(made: tuple[nn.Module, fv.Profile]) -> None:
    model, profile = made
    levels = {s.name: bytes([0, 4] * (s.tiles // 2) + [0] * (s.tiles % 2)) for s in profile.weight_sites()}
    fv.apply(model, PrecisionMap(profile.sites, {**profile.uniform(4).levels, **levels}, profile.other_bytes))
    before = model(X)
    fv.compact(model)
    assert torch.equal(model(X), before)
    for weight in registry_of(model).weights.values():
        kept = int((weight.value.stored_levels == 4).sum())
        assert weight.value.scales.numel() == kept * 32
        assert weight.value.planes[3].numel() == weight.value.planes[4].numel() == 0


@pytest.mark.parametrize("keep", [6, 8, "map"])
def test_more_than_is_read_can_stay(made: tuple[nn.Module, fv.Profile], keep: int | str) -> None:
    model, profile = made
    expected: dict[int, Tensor] = {}
    for level in (3, 6):
        fv.apply(model, profile.uniform(level))
        expected[level] = model(X)
    fv.apply(model, profile.uniform(3))
    fv.compact(model, profile.uniform(6) if keep == "map" else int(keep))
    assert torch.equal(model(X), expected[3])
    fv.apply(model, profile.uniform(6))
    assert torch.equal(model(X), expected[6])
    fv.compact(model, 8)  # what the weights have, where that is less
    with (
        pytest.raises(PlaneNotResidentError, match="at level 8: some of its tiles are stored up to 6 bits only")
        if (keep != 8)
        else pytest.raises(FoveateError, match="more is read now")
    ):
        fv.compact(model, profile.uniform(8 if keep != 8 else 2))
    assert torch.equal(model(X), expected[6])


def test_what_requests_and_choosing_inputs_read_stays(made: tuple[nn.Module, fv.Profile]) -> None:
    model, profile = made
    chain = fv.frontier(profile, 8)
    fv.apply(model, chain)
    fv.set_index(model, 5)
    requests = [None, fv.Request(tier=2)] * 4 + [None]
    with fv.row_precision(model, requests):
        before = model(X)
        fv.compact(model)
        assert torch.equal(model(X), before)
    fv.set_index(model, 2)  # the request's map is still there
    with pytest.raises(PlaneNotResidentError):
        fv.set_index(model, 0)


def test_a_fused_decoder_and_a_state(tmp_path: Path) -> None:
    model, profile = quantized_llama()
    fv.apply(model, profile.uniform(3))
    batch = tokens()[0]
    with torch.no_grad():
        before = model(**batch).logits
        assert fv.compact(model) > 0
        assert torch.equal(model(**batch).logits, before)
        ids = batch["input_ids"][:1]
        told = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    other, _ = quantized_llama()
    fv.apply(other, profile.uniform(3))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, before)
        assert torch.equal(other.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), told)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, before)


def test_exact_tiles_stay_where_they_are_read() -> None:
    model = mlp()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False, exact=1.0)
    fv.apply(model, profile.uniform(16))
    before = model(X)
    fv.compact(model)
    assert torch.equal(model(X), before)
    assert all(plane.numel() == 0 for w in registry_of(model).weights.values() for plane in w.value.planes)


def test_only_levels_and_maps_of_the_model_can_be_kept(made: tuple[nn.Module, fv.Profile]) -> None:
    model, profile = made
    fv.apply(model, profile.uniform(3))
    before, size = model(X), _stored(model)
    for level in (5, 9, -1):
        with pytest.raises(LevelError):
            fv.compact(model, level)
    _, other = quantized_llama()
    with pytest.raises(SiteError):
        fv.compact(model, other.uniform(4))
    assert _stored(model) == size
    assert torch.equal(model(X), before)


def test_models_whose_planes_come_and_go_are_resized_instead(
    made: tuple[nn.Module, fv.Profile], tmp_path: Path
) -> None:
    fv.save(made[0], tmp_path / "out")
    loaded = fv.load(tmp_path / "out", model=mlp(), memory="1GiB")
    with pytest.raises(FoveateError, match=r"foveate\.resize gives memory back"):
        fv.compact(loaded)
    with pytest.raises(FoveateError):
        fv.compact(mlp())
