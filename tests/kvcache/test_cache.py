"""The cache as transformers sees it: beside DynamicCache, call by call."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from caches import BLOCK, LENGTH, WINDOW, cache, ids, layer, read, same, states
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import foveate as fv
from foveate.kvcache import layers as cache_layers
from foveate.nn.foreign.cache_argument import cache_argument
from tiny import llama, llama_config


@given(cuts=st.lists(st.integers(1, 70), min_size=1, max_size=8), level=st.sampled_from([2, 4, 8, 16, 32]))
def test_what_is_stored_does_not_depend_on_how_many_tokens_come_at_a_time(cuts: list[int], level: int) -> None:
    keys, values = states(sum(cuts))
    at_once, by_parts = layer(level), layer(level)
    at_once.update(keys, values)
    seen = 0
    for k, v in zip(keys.split(cuts, 2), values.split(cuts, 2), strict=True):
        seen += k.shape[2]
        returned = by_parts.update(k, v)
        # the newest tokens, and the window before them, are read as they came
        fresh = min(seen, k.shape[2] + WINDOW)
        assert torch.equal(returned[0][:, :, seen - fresh :], keys[:, :, seen - fresh : seen])
        assert torch.equal(returned[1][:, :, seen - fresh :], values[:, :, seen - fresh : seen])
        assert by_parts.get_seq_length() == seen == returned[0].shape[2]
    assert same(read(at_once), read(by_parts))
    assert at_once.nbytes == by_parts.nbytes
    assert WINDOW <= at_once.exact_tokens < WINDOW + BLOCK or at_once.exact_tokens == sum(cuts)


def test_a_prompt_attends_to_itself_exactly() -> None:
    keys, values = states(200)
    assert same(layer(2).update(keys, values), (keys, values))


def test_appending_leaves_what_is_packed_as_it_was() -> None:
    keys, values = states(300)
    one = layer(2)
    one.update(keys[:, :, :100], values[:, :, :100])
    packed = 100 - one.exact_tokens
    before = [t[:, :, :packed].clone() for t in read(one)]
    for i in range(100, 300, 7):
        one.update(keys[:, :, i : i + 7], values[:, :, i : i + 7])
    assert all(torch.equal(a, b[:, :, :packed]) for a, b in zip(before, read(one), strict=True))


@given(
    steps=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 80)), min_size=1, max_size=8),
    level=st.sampled_from([4, 32]),
)
def test_crop_takes_tokens_from_the_end_and_packs_nothing_twice(steps: list[tuple[int, int]], level: int) -> None:
    one, exact = layer(level), DynamicCache()
    for seed, (more, fewer) in enumerate(steps):
        keys, values = states(more, seed=seed)
        one.update(keys, values)
        exact.update(keys, values, 0)
        before = read(one)
        fewer = min(fewer, exact.get_seq_length())
        one.crop(-fewer)
        exact.layers[0].crop(-fewer)
        assert one.get_seq_length() == exact.get_seq_length() == read(one)[0].shape[2]
        # what is left reads as it did
        left = one.get_seq_length()
        assert same(read(one), (before[0][:, :, :left], before[1][:, :, :left]))
        assert level != 32 or same(read(one), (exact.layers[0].keys, exact.layers[0].values))


def test_crop_of_more_than_there_is_leaves_nothing() -> None:
    keys, values = states(100)
    one = layer()
    one.crop(-3)
    assert one.get_seq_length() == 0
    one.update(keys, values)
    one.crop(-1000)
    assert (one.get_seq_length(), one.nbytes) == (0, 0)
    assert one.update(keys, values)[0].shape[2] == 100


@pytest.mark.parametrize("removes", [True, False], ids=["5.15 and newer", "5.14 and older"])
def test_crop_to_a_length_is_as_the_release_of_transformers_has_it(
    removes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_layers, "_CROP_REMOVES", removes)
    one = layer()
    one.update(*states(100))
    if removes:
        one.crop(0)
        assert one.get_seq_length() == 100
        with pytest.raises(ValueError, match=r"tokens_to_remove \(=5\) must be negative"):
            one.crop(5)
    else:
        for length, left in ((120, 100), (100, 100), (90, 90), (0, 0)):
            one.crop(length)
            assert one.get_seq_length() == left


@pytest.mark.parametrize("level", [2, 4, 8, 16, 32])
def test_sequences_are_reordered_repeated_and_selected_as_dynamic_caches_are(level: int) -> None:
    keys, values = states(100, batch=3)
    one, exact = layer(level), DynamicCache()
    one.update(keys, values)
    # beside a DynamicCache of what was stored
    exact.update(*read(one), 0)
    for change in (
        lambda c: c.reorder_cache(torch.tensor([2, 0, 1])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([5, 1, 1])),
        lambda c: c.batch_select_indices(torch.tensor([True, False, True])),
    ):
        change(one)
        change(exact.layers[0])
        assert same(read(one), (exact.layers[0].keys, exact.layers[0].values))
    more = states(60, batch=2, seed=5)
    returned, wanted = one.update(*more), exact.update(*more, 0)
    assert same(returned, wanted)


def test_an_empty_cache_takes_every_call() -> None:
    one = layer()
    one.reorder_cache(torch.tensor([0]))
    one.batch_repeat_interleave(2)
    one.batch_select_indices(torch.tensor([0]))
    assert (one.keys, one.values, one.get_seq_length(), one.nbytes) == (None, None, 0, 0)
    # older releases take the positions of the new tokens, not their number
    by_number = "query_length" in inspect.signature(DynamicLayer.get_mask_sizes).parameters
    new: Any = 5 if by_number else torch.arange(5)
    assert one.get_mask_sizes(new) == (5, 0)
    one.update(*states(100))
    assert one.get_mask_sizes(new) == (105, 0)
    one.reset()
    assert (one.keys, one.get_seq_length(), one.nbytes) == (None, 0, 0)
    # of another batch than before
    assert one.update(*states(3, batch=5))[0].shape == (5, 2, 3, 8)


def test_no_tokens_no_sequences() -> None:
    one = layer()
    assert one.update(*states(0))[0].shape == (2, 2, 0, 8)
    assert one.update(*states(100))[0].shape == (2, 2, 100, 8)
    assert one.update(*states(0))[0].shape == (2, 2, 100, 8)
    none = layer()
    none.update(*states(100, batch=0))
    assert none.update(*states(1, batch=0))[0].shape == (0, 2, 101, 8)


def test_numbers_that_are_not_finite_come_back() -> None:
    keys, values = states(100)
    keys[0, 1, 7, 3], values[1, 0, 40, 2] = float("nan"), float("-inf")
    one = layer(4)
    one.update(keys, values)
    held = read(one)
    assert bool(held[0][0, 1, 7, 3].isnan())
    assert float(held[1][1, 0, 40, 2]) == float("-inf")
    assert int((~held[0].isfinite()).sum()) == int((~held[1].isfinite()).sum()) == 1


def test_memory_is_codes_ranges_and_the_exact_end() -> None:
    keys, values = states(1000)
    one = layer(4)
    one.update(keys, values)
    packed = 1000 - one.exact_tokens
    assert packed % BLOCK == 0
    assert one.nbytes == 2 * 2 * 2 * 8 * (packed * (4 + 32 / BLOCK) / 8 + 4 * one.exact_tokens)


def test_gradients_reach_the_exact_end() -> None:
    keys, values = states(60)
    one = layer(4)
    one.update(keys[:, :, :50], values[:, :, :50])
    new = (keys[:, :, 50:].clone().requires_grad_(), values[:, :, 50:].clone().requires_grad_())
    returned = one.update(*new)
    (returned[0].sum() + 2 * returned[1].sum()).backward()
    assert torch.equal(new[0].grad, torch.ones_like(new[0]))
    assert torch.equal(new[1].grad, torch.full_like(new[1], 2))


def test_maps_give_each_head_its_level() -> None:
    model = llama(**LENGTH)
    profile = fv.calibrate_cache(model, [ids(length=120)], block=32, progress=False)
    plan = profile.uniform(4).with_level("*.0.*:cache.key", 8)
    named = {s.name: s for s in plan.sites}
    mixed = fv.PrecisionMap(plan.sites, {**plan.levels, "model.layers.1.self_attn:cache.value": bytes((2, 32))})
    assert named["model.layers.1.self_attn:cache.value"].tiles == 2
    one = cache(mixed)
    with torch.no_grad():
        model(ids(length=120), **cache_argument(model, one))
    levels = [(part.key_levels, part.value_levels) for part in one.layers]
    assert levels == [(8, 4), (4, (2, 32))]
    assert one.layers[0].block == 32
    # what the profile says a map holds is what the cache holds
    assert one.nbytes == profile.nbytes(mixed, 120, window=WINDOW, sequences=2)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"levels": 3}, fv.LevelError, r"cache level \(=3\) is not one of 2, 4, 8, 16, 32"),
        ({"window": -1}, fv.LevelError, r"window \(=-1\)"),
        ({"window": 1.5}, fv.LevelError, r"window \(=1.5\)"),
        ({"block": 40}, fv.LevelError, r"block \(=40\) is not a multiple of 32"),
        ({"block": 0}, fv.LevelError, r"block \(=0\)"),
    ],
)
def test_refusals(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fv.quantized_cache(llama_config(), **given)


def test_a_model_is_no_configuration() -> None:
    with pytest.raises(fv.DataError, match=r"config is a LlamaForCausalLM.*give model\.config"):
        fv.quantized_cache(llama(**LENGTH), 4)


def test_maps_of_other_models_are_refused() -> None:
    profile = fv.calibrate_cache(llama(**LENGTH), [ids(length=120)], block=32, progress=False)
    with pytest.raises(fv.SiteError, match=r"2 cache\.key and 2 cache\.value sites, and the model has 3 layers"):
        fv.quantized_cache(llama_config(num_hidden_layers=3), profile.uniform(4))
    other = llama(num_key_value_heads=4, **LENGTH)
    levels = {s.name: bytes((4, 8)) for s in profile.sites}
    one = cache(fv.PrecisionMap(profile.sites, levels))
    with pytest.raises(fv.LevelError, match="levels for 2 heads, and the layer has 4"):
        other(ids(length=90), **cache_argument(other, one))


def test_models_without_plain_attention_are_refused() -> None:
    from transformers import MambaConfig, MistralConfig

    with pytest.raises(fv.SiteError, match="no layer with plain attention"):
        fv.quantized_cache(MistralConfig(sliding_window=16, num_hidden_layers=2))
    with pytest.raises(fv.SiteError, match="no layer with plain attention"):
        fv.quantized_cache(MambaConfig(num_hidden_layers=2))


def test_offloading_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="not offloaded"):
        layer().offload()
