"""Decoders in one op over packed caches: the same as block by block, in every way that a cache is used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.nn.foreign.cache_argument import cache_argument
from nn.decoders import FAMILIES, forward_of, model_of, same
from tiny import generator

pytestmark = pytest.mark.skipif(fv.backends()[0].runs is False, reason="no compiled kernels")

WINDOW, BLOCK = 8, 32
LENGTH = {"max_position_embeddings": 512}
#: Tokens of consecutive calls: prompts, single tokens, calls that end within a block.
PARTS = (50, 1, 1, 40, 1, 33, 1)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def ids(batch: int = 2, length: int = sum(PARTS)) -> Tensor:
    return torch.randint(3, 101, (batch, length), generator=generator(1))


def packed(model: Any, levels: Any = 4) -> Any:
    return fv.quantized_cache(model.config, levels, window=WINDOW, block=BLOCK)


def logits(model: Any, cache: Any, given: Tensor, parts: tuple[int, ...] = PARTS, **more: Any) -> Tensor:
    found = [model(input_ids=part, **cache_argument(model, cache), **more).logits for part in given.split(parts, 1)]
    return torch.cat(found, 1)


def fused_calls(model: Any) -> int:
    return forward_of(model).fused_calls


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_its_blocks_give(family: str) -> None:
    model = model_of(family, **LENGTH)
    model(input_ids=ids(1, 3))
    if forward_of(model).reason:
        pytest.skip(f"not fused with this release: {forward_of(model).reason}")
    before = fused_calls(model)
    try:
        one = packed(model)
    except fv.SiteError:
        pytest.skip("all layers have a sliding window")
    fused = logits(model, one, ids())
    assert fused_calls(model) == before + len(PARTS)
    fv.unfuse(model)
    other = packed(model)
    assert same(fused, logits(model, other, ids()))
    assert one.get_seq_length() == other.get_seq_length() == sum(PARTS)


@pytest.mark.parametrize("levels", [2, 8, 16, 32, "map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_levels_of_heads(levels: Any, dtype: torch.dtype) -> None:
    model = model_of("Llama", dtype, **LENGTH)
    if levels == "map":
        sites = fv.calibrate_cache(model_of("Llama", **LENGTH), [ids()], block=BLOCK, progress=False).sites
        levels = fv.PrecisionMap(sites, {s.name: bytes((2, 8) if "key" in s.name else (32, 4)) for s in sites})
    before = fused_calls(model)
    fused = logits(model, packed(model, levels), ids())
    assert fused_calls(model) == before + len(PARTS)
    fv.unfuse(model)
    # numbers of bfloat16 are rounded once more where blocks hand them on
    assert same(fused, logits(model, packed(model, levels), ids()), 0.01 if dtype == torch.float32 else 0.1)


def test_padding_on_the_left() -> None:
    model = model_of("Llama", **LENGTH)
    given = ids(2, 120)
    mask = torch.ones_like(given)
    mask[0, :45] = 0  # a whole packed block, and a part of the next

    def run() -> Tensor:
        cache, found = packed(model), []
        for end, part in zip((100, 101, 120), given.split((100, 1, 19), 1), strict=True):
            found.append(model(input_ids=part, attention_mask=mask[:, :end], **cache_argument(model, cache)).logits)
        return torch.cat(found, 1)[mask.bool()]

    before = fused_calls(model)
    fused = run()
    assert fused_calls(model) == before + 3
    fv.unfuse(model)
    assert same(fused, run())


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 16}],
    ids=lambda how: next(iter(how)),
)
def test_generate_with_beams_crops_and_chunks(how: dict[str, Any]) -> None:
    model = model_of("Llama", **LENGTH)
    given = ids(1, 60)

    def run() -> Tensor:
        cache = cache_argument(model.generate, packed(model, 32))
        out: Tensor = model.generate(given, max_new_tokens=50, do_sample=False, **how, **cache)
        return out

    before = fused_calls(model)
    fused = run()
    assert fused_calls(model) > before + 5
    fv.unfuse(model)
    assert torch.equal(fused[:, :90], run()[:, :90])


def test_copies_and_views_are_not_written_to() -> None:
    model = model_of("Llama", **LENGTH)
    one = packed(model)
    logits(model, one, ids(2, 90), (90,))
    view = one.layers[0].keys
    kept, other = view.clone(), copy.deepcopy(one)
    more = ids(2, 40)
    mine = logits(model, one, more, (1, 39))
    assert torch.equal(view, kept)
    assert other.get_seq_length() == 90
    assert torch.equal(mine, logits(model, other, more, (1, 39)))


def test_a_crop_into_a_block_and_numbers_that_are_not_finite_run_block_by_block() -> None:
    model = model_of("Llama", **LENGTH)
    cropped, strange = packed(model), packed(model, 32)
    logits(model, cropped, ids(2, 90), (90,))
    cropped.crop(-40)  # the exact end has 26 tokens, and the last block loses 14
    logits(model, strange, ids(2, 90), (90,))
    strange.layers[0]._histories[1].packed.stores[0][1].is_finite = False
    strange.layers[0].changes += 1
    for cache in (cropped, strange):
        before, other = fused_calls(model), copy.deepcopy(cache)
        found = logits(model, cache, ids(2, 4), (4,))
        assert fused_calls(model) == before
        assert torch.equal(found, logits(model, other, ids(2, 4), (4,)))


def test_a_cache_of_another_batch_is_not_fused() -> None:
    model = model_of("Llama", **LENGTH)
    one = packed(model)
    logits(model, one, ids(2, 90), (90,))
    assert forward_of(model)._fused((), {"input_ids": ids(3, 1), **cache_argument(model, one)}) is None


def test_a_cache_that_was_filled_in_inference_mode_goes_on_outside_of_it() -> None:
    model = model_of("Llama", **LENGTH)
    one, other = packed(model), packed(model)
    with torch.inference_mode():
        logits(model, one, ids(2, 90), (90,))
    logits(model, other, ids(2, 90), (90,))
    more = ids(2, 40)
    before = fused_calls(model)
    assert torch.equal(logits(model, one, more, (1, 39)), logits(model, other, more, (1, 39)))
    assert fused_calls(model) == before + 4
