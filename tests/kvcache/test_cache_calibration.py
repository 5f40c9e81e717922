"""The measured loss of packed caches, and the maps that follow from it."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import foveate as fv
from foveate.formats.levels import CACHE_LEVELS
from foveate.kvcache.blocks import Blocks
from foveate.kvcache.profile import CacheProfile
from foveate.nn.foreign.cache_argument import cache_argument
from foveate.precision.maps import PrecisionMap, Site, tile_levels
from tiny import generator, llama

BLOCK = 32
LENGTH = {"max_position_embeddings": 512}


def ids(batch: int = 4, length: int = 128, seed: int = 3) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=generator(seed))


def confident(**changes: Any) -> Any:
    """A tiny Llama whose logits, and so whose losses, are not all but flat."""
    model = llama(**LENGTH, **changes)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(6)
    return model


def calibrated(model: Any, **given: Any) -> CacheProfile:
    given = {"block": BLOCK, "progress": False, **given}
    return fv.calibrate_cache(model, [ids(seed=1), ids(seed=2)], **given)


@cache
def profile() -> CacheProfile:
    return calibrated(confident())


def measured(model: Any, tokens: Tensor, level: int, chosen: str = "*") -> float:
    """KL of the second half from a first half whose keys or values (or both) were packed."""
    half = tokens.shape[1] // 2
    with torch.no_grad():
        exact, packed = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(tokens[:, :half], **cache_argument(model, exact))
        for i, part in enumerate(exact.layers):
            both = []
            for name, x in ((f"{i}.key", part.keys), (f"{i}.value", part.values)):
                blocks = Blocks(level, BLOCK)
                blocks.append(x)
                both.append(blocks.read(0, len(blocks)).flatten(2, 3) if chosen in ("*", name) else x)
            packed.update(*both, i)
        wanted, found = (
            model(tokens[:, half:], **cache_argument(model, c)).logits.double().log_softmax(-1) for c in (exact, packed)
        )
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_sites_are_keys_and_values_of_each_layer_and_heads_are_their_tiles() -> None:
    sites = profile().sites
    assert [s.name for s in sites] == [
        f"model.layers.{i}.self_attn:cache.{what}" for i in range(2) for what in ("key", "value")
    ]
    assert {(s.kind, s.rows, s.tiles, s.columns, s.group, s.weights) for s in sites} == {("cache", 2, 2, 8, BLOCK, 0)}
    assert profile().samples == 2 * 4 * 64
    assert all(table.shape == (2, len(CACHE_LEVELS)) for table in profile().losses.values())


def test_the_prediction_is_the_divergence() -> None:
    model = confident()
    predicted = calibrated(model, measured=0)
    for level in (4, 8):
        found = sum(measured(model, ids(seed=seed), level) for seed in (1, 2)) / 2
        assert predicted.uniform(level).predicted_loss == pytest.approx(found, rel=0.6)
    assert predicted.uniform(32).predicted_loss == 0


def test_two_bits_are_measured_and_heads_keep_their_shares() -> None:
    model = confident()
    alone, beside = calibrated(model, measured=0), calibrated(model, measured=1)
    for site in beside.sites:
        name = f"{site.name.split('.')[2]}.{site.name.rpartition('.')[2]}"
        found, predicted = beside.losses[site.name], alone.losses[site.name]
        assert float(found[:, 0].sum()) == pytest.approx(measured(model, ids(seed=1), 2, name), rel=0.05, abs=1e-7)
        assert torch.allclose(found[:, 0] / found[:, 0].sum(), predicted[:, 0] / predicted[:, 0].sum(), rtol=1e-4)
        assert torch.equal(found[:, 1:], predicted[:, 1:])


def test_a_head_that_nothing_reads_loses_nothing_and_gets_two_bits() -> None:
    model = confident()
    with torch.no_grad():
        # query heads 2 and 3 read head 1 of keys and values
        model.model.layers[0].self_attn.o_proj.weight[:, 16:] = 0
    found = calibrated(model)
    for what in ("key", "value"):
        table = found.losses[f"model.layers.0.self_attn:cache.{what}"]
        assert float(table[1].abs().max()) == 0
        assert float(table[0, 0]) > 0
    plan = found.plan(fv.Budget(bits=6.0))
    for what in ("key", "value"):
        levels = plan.levels[f"model.layers.0.self_attn:cache.{what}"]
        assert isinstance(levels, bytes)
        assert levels[1] == 2 < levels[0]


def test_on_unseen_text_the_map_loses_what_was_predicted_and_its_opposite_more() -> None:
    model = confident()

    def lost(levels: PrecisionMap) -> float:
        one, exact = fv.quantized_cache(model.config, levels, window=0), DynamicCache(config=model.config)
        prompt, rest = ids(batch=16, seed=9).split(64, 1)
        with torch.no_grad():
            for c in (one, exact):
                model(prompt, **cache_argument(model, c))
            found, wanted = (
                model(rest, **cache_argument(model, c)).logits.double().log_softmax(-1) for c in (one, exact)
            )
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    plan = profile().plan(fv.Budget(bits=4.0))
    levels = {name: bytes(6 - level for level in tile_levels(held, 2)) for name, held in plan.levels.items()}
    opposite = PrecisionMap(plan.sites, levels)
    assert {2, 4} == {level for held in levels.values() for level in held}
    assert opposite.cache_bits == plan.cache_bits == 4.0
    assert lost(plan) < lost(opposite)
    assert lost(plan) == pytest.approx(plan.predicted_loss, rel=0.5)


@given(bits=st.floats(3.0, 18.0), more=st.floats(0.0, 4.0))
def test_budgets_of_bits_are_kept_and_more_bits_lose_no_more(bits: float, more: float) -> None:
    plan, larger = (profile().plan(fv.Budget(bits=b)) for b in (bits, bits + more))
    assert plan.cache_bits <= bits + 1e-9
    assert larger.predicted_loss <= plan.predicted_loss
    again = profile().plan(fv.Budget(bits=plan.cache_bits))
    assert again.predicted_loss <= plan.predicted_loss


@given(tokens=st.integers(1, 3000), window=st.integers(0, 100), share=st.floats(0.0, 1.0))
def test_budgets_of_bytes_are_kept(tokens: int, window: int, share: float) -> None:
    low, high = (profile().nbytes(profile().uniform(level), tokens, window=window) for level in (2, 16))
    room = low + round(share * (high - low))
    plan = profile().plan(fv.Budget(bytes=room), tokens=tokens, window=window)
    assert profile().nbytes(plan, tokens, window=window) <= room
    one = fv.quantized_cache(llama(**LENGTH).config, plan, window=window)
    states = torch.zeros(1, 2, tokens, 8)
    for i in range(2):
        one.update(states, states, i)
    assert one.nbytes == profile().nbytes(plan, tokens, window=window)


def test_budgets_of_loss_are_kept_with_fewest_bits() -> None:
    for limit in (1e-1, 1e-3, 1e-5):
        plan = profile().plan(fv.Budget(loss=limit), levels=(2, 4, 8, 16, 32))
        assert plan.predicted_loss <= limit
        assert plan.cache_bits == pytest.approx(fewest_bits(limit))


def fewest_bits(limit: float) -> float:
    """Of all maps that lose no more than the limit: the least loss at every sum of bits, head after head."""
    bits = [profile().uniform(level).cache_bits for level in CACHE_LEVELS]
    heads = torch.cat(list(profile().losses.values())).tolist()
    least = {0.0: 0.0}
    for losses in heads:
        longer: dict[float, float] = {}
        for (spent, lost), (more, loss) in itertools.product(least.items(), zip(bits, losses, strict=True)):
            longer[spent + more] = min(lost + loss, longer.get(spent + more, math.inf))
        least = longer
    return min(spent for spent, lost in least.items() if lost <= limit) / len(heads)


@pytest.mark.parametrize(
    ("budget", "given", "words"),
    [
        (fv.Budget(bits=2.5), {}, r"no map averages 2.5 bits a cached number: the least is 3.0000"),
        (fv.Budget(bits=4.0), {"levels": (8,)}, "the least is 9.0000"),
        (fv.Budget(bits=4.0), {"levels": ()}, "levels is empty"),
        (fv.Budget(bytes=100), {"tokens": 1000}, r"no map holds 1000 tokens in 100 B: the least is .* bytes\)"),
        (fv.Budget(bytes=30000), {"tokens": 1000}, "no map holds 1000 tokens"),
        (fv.Budget(bytes=100), {}, r"tokens \(=None\)"),
        (fv.Budget(bytes=100), {"tokens": 0}, r"tokens \(=0\)"),
        (4, {}, r"budget \(=4\) is not a Budget"),
        (fv.Budget(latency="1s"), {}, "latency cannot be a budget of a cache"),
        (fv.Budget(loss=1e-30), {"levels": (2, 4)}, "no map loses as little"),
    ],
)
def test_budgets_that_cannot_be_met_say_the_least(budget: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(fv.BudgetError, match=words):
        profile().plan(budget, **given)


def test_maps_of_caches_are_maps() -> None:
    plan = profile().plan(fv.Budget(bits=4.0))
    assert PrecisionMap.from_json(plan.to_json(), plan.sites, 0) == plan
    assert "bits a cached number" in repr(plan)
    assert plan.with_level("*:cache.*", 4).cache_bits == 4 + 32 / BLOCK
    assert plan.with_level("*:cache.key", 32).with_level("*:cache.value", 2).cache_bits == (32 + 3) / 2
    with pytest.raises(fv.LevelError, match=r"cache level \(=6\)"):
        plan.with_level("*:cache.key", 6)
    with pytest.raises(fv.LevelError, match=r"cache level \(=3\)"):
        PrecisionMap(plan.sites, {s.name: bytes((4, 3)) for s in plan.sites})
    with pytest.raises(fv.LevelError, match="3 tile levels for 2 tiles"):
        PrecisionMap(plan.sites, {s.name: bytes((4, 4, 4)) for s in plan.sites})
    weight = Site("a:weight", "weight", 16, 32, 32)
    both = PrecisionMap((weight, *plan.sites), {"a:weight": 4, **plan.levels})
    assert both.cache_bits == plan.cache_bits
    assert both.bits == PrecisionMap((weight,), {"a:weight": 4}).bits
    assert "bits a weight" in repr(both)


def test_sixteen_bits_of_a_16_bit_model_are_exact() -> None:
    found = calibrated(confident().to(torch.bfloat16))
    assert found.itemsize == 2
    assert found.uniform(16).predicted_loss == 0
    assert found.nbytes(found.uniform(16), 1000) == 1000 * 2 * 2 * 2 * 8 * 2
    assert found.nbytes(found.uniform(32), 1000) == found.nbytes(found.uniform(16), 1000)


def test_padding_is_not_scored_and_the_model_is_left_as_it_was() -> None:
    model = confident().train()
    part = next(iter(model.children())).eval()  # a part that is not trained
    mask = torch.ones(4, 128, dtype=torch.long)
    mask[0, :20], mask[1, 120:] = 0, 0
    state = torch.random.get_rng_state()
    found = fv.calibrate_cache(
        model, [{"input_ids": ids(), "attention_mask": mask}], block=BLOCK, progress=False, measured=0
    )
    assert found.samples == 4 * 64 - 8
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not any(module.training for module in part.modules())
    assert all(p.grad is None for p in model.parameters())
    again = fv.calibrate_cache(
        model, [{"input_ids": ids(), "attention_mask": mask}], block=BLOCK, progress=False, measured=0
    )
    assert all(torch.equal(found.losses[n], again.losses[n]) for n in found.losses)


def test_sliding_layers_have_no_sites() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    found = calibrated(model)
    assert [s.name for s in found.sites] == [
        f"model.layers.{i}.self_attn:cache.{what}" for i in (1, 3) for what in ("key", "value")
    ]
    one = fv.quantized_cache(config, found.plan(fv.Budget(bits=4.0)))
    assert model.generate(ids(batch=1), **cache_argument(model.generate, one), max_new_tokens=5).shape == (1, 133)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no batches"),
        ([ids(length=32)], r"a batch \(=\(4, 32\)\) is not tokens \[B, T\] with T > 32"),
        ([torch.zeros(5, dtype=torch.long)], r"a batch \(=\(5,\)\)"),
        ([{"input_ids": [1, 2]}], r"a batch \(=list\)"),
    ],
)
def test_data_that_say_nothing_are_refused(batches: list[Any], words: str) -> None:
    with pytest.raises(fv.DataError, match=words):
        fv.calibrate_cache(llama(**LENGTH), batches, block=BLOCK, progress=False)


def test_models_that_are_broken_or_cache_nothing_are_refused() -> None:
    model = llama(**LENGTH)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(fv.DataError, match="not finite"):
        calibrated(model)
    with pytest.raises(fv.SiteError, match="no layer with plain attention"):
        calibrated(llama_without_a_cache())
    with pytest.raises(fv.LevelError, match=r"block \(=48\)"):
        calibrated(llama(**LENGTH), block=48)


def llama_without_a_cache() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1))
