"""Fused decoders: what is recognized, which calls are fused, and that they give what the blocks give."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.nn.decoder import agreement
from foveate.nn.decoder.fused import FusedForward
from foveate.nn.foreign.cache_argument import cache_argument
from nn.decoders import FAMILIES, forward_of, model_of, same
from tiny import generator, quantized_llama, tokens

transformers = pytest.importorskip("transformers")

needs_compiler = pytest.mark.skipif(fv.backends()[0].runs is False, reason="no compiled kernels")
pytestmark = needs_compiler


class OtherCache(transformers.DynamicCache):  # type: ignore[misc]
    """A cache that may do otherwise than that of transformers."""


def ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 101, (batch, length), generator=generator(seed))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def both(model: Any, **call: Any) -> tuple[Tensor, Tensor]:
    """Logits of a call that must be fused, and those of the blocks."""
    calls = forward_of(model).fused_calls
    fused = model(**call).logits
    assert forward_of(model).fused_calls == calls + 1, fv.backends(model)
    fv.unfuse(model)
    plain = model(**call).logits
    fv.fuse(model)
    return fused, plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_of_transformers_is_recognized_and_gives_what_its_blocks_give(family: str) -> None:
    model = model_of(family)
    assert [found.fused for found in fv.backends(model)] == [True], fv.backends(model)
    if "normalizer" in inspect.getsource(type(model.base_model).forward):  # transformers 5.0 scales embeddings there
        model(input_ids=ids())
        assert "its blocks compute something else" in str(fv.backends(model))
        return
    assert same(*both(model, input_ids=ids()))
    padded = ids()
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    fused, plain = both(model, input_ids=padded, attention_mask=mask)
    assert same(fused[mask.bool()], plain[mask.bool()])
    given = {"input_ids": ids(1, 5), "max_new_tokens": 6, "do_sample": False}
    calls = forward_of(model).fused_calls
    fused = _scores(model, given)
    assert forward_of(model).fused_calls == calls + 6
    fv.unfuse(model)
    assert same(fused, _scores(model, given))


@pytest.mark.parametrize(("batch", "length"), [(1, 513), (3, 255), (9, 60)])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_call_of_more_rows_than_are_taken_at_once(batch: int, length: int, use_cache: bool) -> None:
    model = model_of("Llama", max_position_embeddings=1024)
    assert same(*both(model, input_ids=ids(batch, length), use_cache=use_cache))


def _scores(model: Any, given: dict[str, Any]) -> Tensor:
    return torch.stack(model.generate(**given, return_dict_in_generate=True, output_scores=True).scores)


def test_generate_is_fused_with_dynamic_and_static_caches() -> None:
    model = model_of("Llama")
    knows_its_length = hasattr(transformers.cache_utils.StaticLayer(4), "cumulative_length")  # not in transformers 5.0
    for cache, calls in (("dynamic", 6), ("static", 6 if knows_its_length else 0)):
        before = forward_of(model).fused_calls
        model.generate(input_ids=ids(1), max_new_tokens=6, do_sample=False, cache_implementation=cache)
        assert forward_of(model).fused_calls == before + calls


def test_continuous_batching_is_fused() -> None:
    model = model_of("Llama")
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this release of transformers has no continuous batching, or none that runs on a CPU")
    config = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [ids(1, length, seed=length)[0].tolist() for length in (5, 9, 3)]

    def answers() -> list[list[int]]:
        return [done.generated_tokens for done in model.generate_batch(prompts, generation_config=config).values()]

    together = answers()
    assert forward_of(model).fused_calls > 0
    fv.unfuse(model)
    assert answers() == together


def test_halves() -> None:
    model = model_of("Llama", torch.bfloat16)
    fused, plain = both(model, input_ids=ids())
    assert fused.dtype == torch.bfloat16
    assert same(fused, plain, 0.05)


def test_what_is_not_recognized_says_why_and_runs_as_before() -> None:
    model = model_of("Llama")
    fv.unfuse(model)
    model.model.layers[0].add_module("further", nn.Identity())
    (found,) = fv.fuse(model)
    assert not found.fused
    assert found.reason.startswith("block 0 is made of further, input_layernorm, mlp")
    assert found.blocks == 2
    assert torch.isfinite(model(input_ids=ids()).logits).all()


def test_a_float_layer_is_named() -> None:
    model = model_of("Llama")
    fv.unfuse(model)
    model.model.layers[1].self_attn.o_proj = nn.Linear(64, 64)
    (found,) = fv.fuse(model)
    assert found.reason == "o_proj of block 1 is not on planes but Linear"


def test_a_block_that_computes_something_else_is_found_out() -> None:
    model = model_of("Llama")
    layer = type(model.model.layers[0].mlp)
    original = layer.forward
    layer.forward = lambda self, x: 1.3 * original(self, x)
    try:
        expected = model(input_ids=ids()).logits
        assert "differ" in fv.backends(model)[0].reason  # type: ignore[union-attr]
        assert forward_of(model).fused_calls == 0
        fv.unfuse(model)
        assert torch.equal(model(input_ids=ids()).logits, expected)
    finally:
        layer.forward = original


def test_hooks_on_blocks_run() -> None:
    model, seen = model_of("Llama"), []
    handles = [
        model.model.layers[1].register_forward_hook(lambda *_: seen.append("block")),
        model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append("layer")),
    ]
    model(input_ids=ids())
    assert seen == ["layer", "block"]
    assert forward_of(model).fused_calls == 0
    handles[0].remove()
    model(input_ids=ids())
    assert seen[2:] == ["layer"]


@pytest.mark.parametrize("what", ["gradients", "hidden states", "mask", "module", "cache", "autocast"])
def test_a_call_that_needs_what_is_between_blocks_is_not_fused(what: str) -> None:
    model = model_of("Llama")
    given: dict[str, Any] = {"input_ids": ids()}
    if what == "gradients":
        with torch.enable_grad():
            model(**given)
    elif what == "hidden states":
        assert len(model(**given, output_hidden_states=True).hidden_states) == 3
    elif what == "mask":
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[:, 3] = 0  # a gap
        model(**given, attention_mask=mask)
    elif what == "module":
        model.model.layers[0].mlp.act_fn = nn.Tanh()
        model(**given)
    elif what == "cache":
        model(**given, **cache_argument(model, OtherCache(config=model.config)))
    else:
        with torch.autocast("cpu"):
            model(**given)
    assert forward_of(model).fused_calls == 0


def test_hooks_that_go_let_calls_be_fused_again() -> None:
    model = model_of("Llama")
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    model(input_ids=ids())
    assert forward_of(model).fused_calls == 0
    handle.remove()
    model(input_ids=ids())
    assert forward_of(model).fused_calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_changed_in_place_counts(dtype: torch.dtype) -> None:
    model = model_of("Llama", dtype)
    first = model(input_ids=ids()).logits
    model.model.norm.weight.mul_(-1)
    assert not same(model(input_ids=ids()).logits, first)
    assert same(*both(model, input_ids=ids()), 0.05)


def test_a_model_may_change_its_dtype() -> None:
    model = model_of("Llama")
    model(input_ids=ids())
    fused, plain = both(model.to(torch.bfloat16), input_ids=ids())
    assert fused.dtype == torch.bfloat16
    assert same(fused, plain, 0.05)


def test_a_map_counts_from_the_next_pass_on_and_rows_may_differ() -> None:
    model = model_of("Llama")
    registry = fv.nn.registry.registry_of(model)  # type: ignore[attr-defined]
    maps = {level: fv.precision.maps.uniform(registry.sites, level, registry.other_bytes) for level in (2, 8)}  # type: ignore[attr-defined]
    logits = {}
    for level, plan in maps.items():
        fv.apply(model, plan)
        logits[level] = model(input_ids=ids()).logits
        assert same(*both(model, input_ids=ids()))
    assert not same(logits[2], logits[8])
    fv.apply(model, fv.Frontier((maps[8], maps[2])))
    with fv.row_precision(model, [None, fv.Request(tier=1)]):
        mixed = model(input_ids=ids()).logits
    assert torch.equal(mixed[0], logits[8][0])
    assert torch.equal(mixed[1], logits[2][1])


def test_a_view_of_a_cache_that_somebody_holds_is_not_written_to() -> None:
    model = model_of("Llama")
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=ids(1, 6), cache=cache)
    held = cache.layers[0].keys
    before = held.clone()
    cache.crop(-3)
    model(input_ids=ids(1, 2, seed=5), cache=cache)
    assert torch.equal(held, before)
    assert cache.get_seq_length() == 5
    again = copy.deepcopy(cache)
    model(input_ids=ids(1, 2, seed=6), cache=cache)
    assert again.get_seq_length() == 5
    expected = model(input_ids=ids(1, 2, seed=6), cache=again).logits
    cache.crop(-2)
    assert same(model(input_ids=ids(1, 2, seed=6), cache=cache).logits, expected)


def test_beams_reorder_caches() -> None:
    model = model_of("Llama")
    given = {"input_ids": ids(1), "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    fused = model.generate(**given)
    fv.unfuse(model)
    assert torch.equal(model.generate(**given), fused)


def test_a_copy_of_a_model_fuses_by_itself() -> None:
    model = model_of("Llama")
    expected = model(input_ids=ids()).logits
    other = copy.deepcopy(model)
    assert forward_of(other) is not forward_of(model)
    assert torch.equal(other(input_ids=ids()).logits, expected)
    assert forward_of(other).fused_calls == 1
    assert other.base_model.__dict__["forward"]._base is other.base_model


def test_a_state_that_is_loaded_is_what_is_read() -> None:
    model, other = model_of("Llama"), model_of("Llama")
    state = {name: t.clone() for name, t in other.state_dict().items()}
    state["model.layers.0.mlp.up_proj.weight.plane0"] ^= 0xFF
    before = model(input_ids=ids()).logits
    model.load_state_dict(state)
    assert not same(model(input_ids=ids()).logits, before)
    assert same(*both(model, input_ids=ids()))


def test_a_compiled_model_runs_its_blocks() -> None:
    model = model_of("Llama")
    expected = model(input_ids=ids()).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert same(compiled(input_ids=ids()).logits, expected)
    assert forward_of(model).fused_calls == 1


def test_quantize_and_load_fuse_and_dequantize_ends_it(tmp_path: Any) -> None:
    model, _ = quantized_llama()
    assert [found.fused for found in fv.backends(model)] == [True]
    batch = tokens()[0]
    expected = model(**batch).logits
    assert forward_of(model).fused_calls == 1
    fv.save(model, tmp_path / "out")
    loaded = fv.load(tmp_path / "out")
    assert torch.equal(loaded(**batch).logits, expected)
    assert forward_of(loaded).fused_calls == 1
    fv.dequantize(model)
    assert "forward" not in model.base_model.__dict__


@pytest.mark.parametrize(("own", "is_fused"), [(0.05, True), (0.01, False)])
def test_a_decoder_that_rounding_alone_moves_far_is_fused(
    own: float, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 2 bits the last hidden states of real models differ by percents where their inputs differ by a rounding.

    Args:
        own: how far the blocks are from themselves, where the op is 0.1 from them.
        is_fused: whether that is taken for the same.
    """
    model = model_of("Llama")
    by_op: list[Tensor] = []
    run = FusedForward._by_op

    def kept(self: FusedForward, x: Tensor) -> Tensor | None:
        by_op.append(run(self, x))  # type: ignore[arg-type]
        return by_op[-1]

    def apart(base: Any, x: Tensor, expected: Tensor, found: Tensor) -> float:
        return 0.1 if any(found is other for other in by_op) else own

    monkeypatch.setattr(FusedForward, "_by_op", kept)
    monkeypatch.setattr(agreement, "apart", apart)
    fv.unfuse(model)
    fv.fuse(model)
    model(input_ids=ids())
    assert [found.fused for found in fv.backends(model)] == [is_fused]
