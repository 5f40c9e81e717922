"""The cache in models: prompts, copies, and every way that `generate` uses one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from caches import BLOCK, LENGTH, WINDOW, cache, ids
from transformers import DynamicCache, EncoderDecoderCache

import foveate as fv
from foveate.kvcache.blocks import is_exact
from foveate.kvcache.layers import QuantizedLayer
from foveate.nn.foreign.cache_argument import cache_argument
from tiny import llama


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_go_their_own_way(copied: Any) -> None:
    model = llama(**LENGTH)
    one = cache()
    with torch.no_grad():
        model(ids(), **cache_argument(model, one))
        other = copied(one)
        a = model(ids(length=40), **cache_argument(model, one)).logits
        assert other.get_seq_length() == 90
        b = model(ids(length=40), **cache_argument(model, other)).logits
    assert torch.equal(a, b)


def test_prefilled_exactly_at_level_32_and_closely_at_16() -> None:
    model = llama(**LENGTH)
    with torch.no_grad():
        for level, tolerance in ((32, 0.0), (16, 1e-4)):
            one, exact = cache(level), DynamicCache(config=model.config)
            for part in ids(length=200).split(23, 1):
                a = model(part, **cache_argument(model, one)).logits
                b = model(part, **cache_argument(model, exact)).logits
            assert float((a - b).abs().max()) <= tolerance


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 10},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "prefill_chunk_size": 16},
    ],
    ids=lambda how: " ".join(how),
)
def test_generate_at_level_32_is_generate(how: dict[str, Any]) -> None:
    model = llama(**LENGTH)
    padded = ids(length=50)
    mask = torch.ones_like(padded)
    padded[0, :7], mask[0, :7] = 0, 0

    def run(**given: Any) -> Any:
        torch.manual_seed(0)
        return model.generate(padded, attention_mask=mask, max_new_tokens=60, **how, **given)

    exact = DynamicCache(config=model.config)
    assert torch.equal(run(**cache_argument(model.generate, exact)), run(**cache_argument(model.generate, cache(32))))
    one = cache(4)
    assert run(**cache_argument(model.generate, one)).shape[0] == 2 * how.get("num_return_sequences", 1)
    assert one.get_seq_length() > WINDOW + BLOCK


def test_assisted_generation_crops() -> None:
    model, assistant = llama(**LENGTH), llama(seed=1, **LENGTH)
    prompt = ids(batch=1, length=50)
    how = {"do_sample": False, "max_new_tokens": 60}
    one = cache(32)
    wanted = model.generate(prompt, **how)
    assert torch.equal(
        model.generate(prompt, assistant_model=assistant, **cache_argument(model.generate, one), **how), wanted
    )
    for level in (32, 4):
        given = cache_argument(model.generate, cache(level))
        looked_up = model.generate(prompt, prompt_lookup_num_tokens=4, **given, **how)
        # older releases of transformers can write one token more than they are asked for
        assert 50 < looked_up.shape[1] <= 111
        assert torch.equal(looked_up[:, :50], prompt)
        assert level != 32 or torch.equal(looked_up[:, : wanted.shape[1]], wanted)


def test_a_conversation_goes_on_from_the_cache() -> None:
    model = llama(**LENGTH)
    one, exact = cache(32), DynamicCache(config=model.config)
    said = ids(batch=1, length=40)
    for _ in range(3):
        a = model.generate(
            said, **cache_argument(model.generate, one), do_sample=False, max_new_tokens=20, eos_token_id=None
        )
        b = model.generate(
            said, **cache_argument(model.generate, exact), do_sample=False, max_new_tokens=20, eos_token_id=None
        )
        assert torch.equal(a, b)
        said = torch.cat([a, ids(batch=1, length=5)], 1)


def test_half_precision_models() -> None:
    model = llama(**LENGTH).to(torch.bfloat16)
    with torch.no_grad():
        for level in (4, 16, 32):
            one, exact = cache(level), DynamicCache(config=model.config)
            for part in ids(length=200).split(50, 1):
                a = model(part, **cache_argument(model, one)).logits
                b = model(part, **cache_argument(model, exact)).logits
            assert a.dtype == torch.bfloat16
            # 16 bits of a 16-bit number are that number
            assert not is_exact(level, torch.bfloat16) or torch.equal(a, b)
            assert float((a - b).abs().max()) < 0.1


def test_sliding_windows_keep_the_cache_of_transformers() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    one = fv.quantized_cache(config, 32, window=WINDOW, block=BLOCK)
    assert [isinstance(part, QuantizedLayer) for part in one.layers] == [not sliding for sliding in one.is_sliding]
    assert any(one.is_sliding)
    prompt = ids(batch=2, length=40)
    wanted = model.generate(prompt, do_sample=False, max_new_tokens=60)
    assert torch.equal(
        model.generate(prompt, do_sample=False, max_new_tokens=60, **cache_argument(model.generate, one)), wanted
    )
    assert one.nbytes > sum(part.nbytes for part in one.layers if isinstance(part, QuantizedLayer))
    assert [len(part) for part in one] == [3] * 4


def test_encoders_and_decoders() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=256,
        forced_eos_token_id=None, eos_token_id=2, pad_token_id=0, bos_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    prompt = ids(length=60)
    how = {"do_sample": False, "num_beams": 2, "max_new_tokens": 60, "min_new_tokens": 50}
    wanted = model.generate(prompt, **how)
    # what is said, and what is read: models take the keys of the second straight from its layers
    both = EncoderDecoderCache(
        fv.quantized_cache(config, 32, window=WINDOW, block=BLOCK), fv.quantized_cache(config, 32, window=WINDOW)
    )
    assert torch.equal(model.generate(prompt, **cache_argument(model.generate, both), **how), wanted)
