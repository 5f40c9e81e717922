"""The short decoding loop: the tokens of transformers' own loop, whatever is asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.nn.foreign.cache_argument import cache_argument
from tiny import generator, quantized_llama

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (1, 7), generator=generator(4))
BATCH = torch.randint(3, 50, (3, 7), generator=generator(5))
PADDED = torch.ones_like(BATCH)
PADDED[0, :3] = 0


@pytest.fixture(scope="module")
def model() -> Any:
    made, _ = quantized_llama()
    return made


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class _Streamer:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.seen += value.view(-1).tolist()

    def end(self) -> None:
        self.ended += 1


class _StopAt(transformers.StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)


def _both(model: Any, ids: Tensor, **options: Any) -> list[Any]:
    found = []
    for loop in (None, fv.decoding_loop):
        torch.manual_seed(7)
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "pad_token_id": 0, **options}
        found.append(model.generate(ids, custom_generate=loop, **given))
    return found


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "processors": {"do_sample": False, "repetition_penalty": 1.7, "min_new_tokens": 4},
    "other criteria": {"do_sample": False, "stopping_criteria": transformers.StoppingCriteriaList([_StopAt()])},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "chunks of the prompt": {"do_sample": False, "prefill_chunk_size": 3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ids", [IDS, BATCH], ids=["one", "three"])
def test_tokens_are_those_of_the_loop_of_transformers(model: Any, case: str, ids: Tensor) -> None:
    if case == "chunks of the prompt" and not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("generate of this release of transformers makes no cache for chunks of a prompt")
    expected, got = _both(model, ids, **CASES[case])
    assert torch.equal(got, expected)
    assert got.shape[1] > ids.shape[1]


def test_it_ends_where_the_text_ends(model: Any) -> None:
    whole = model.generate(IDS, do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0)
    end = int(whole[0, IDS.shape[1] + 4])
    for ids in (IDS, BATCH):
        expected, got = _both(model, ids, do_sample=False, eos_token_id=[end, 49])
        assert torch.equal(got, expected)
    assert _both(model, IDS, do_sample=False, eos_token_id=end)[1].shape[1] < whole.shape[1]


def test_padding_and_returned_scores_are_of_transformers(model: Any) -> None:
    expected, got = _both(model, BATCH, do_sample=False, attention_mask=PADDED)
    assert torch.equal(got, expected)
    expected, got = _both(model, IDS, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))


def test_a_streamer_sees_every_token_once(model: Any) -> None:
    streamers = [_Streamer(), _Streamer()]
    # transformers gives a streamer to its own loop only
    loops = (None, functools.partial(fv.decoding_loop, streamer=streamers[1]))
    for loop, streamer in zip(loops, streamers, strict=True):
        model.generate(IDS, custom_generate=loop, streamer=streamer, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert streamers[0].seen == streamers[1].seen
    assert [s.ended for s in streamers] == [1, 1]


def test_a_cache_that_is_given_is_gone_on_with(model: Any) -> None:
    found = []
    for loop in (None, fv.decoding_loop):
        cache = transformers.DynamicCache(config=model.config)
        ids = IDS
        for _ in range(2):
            given = cache_argument(model.generate, cache)
            ids = model.generate(ids, custom_generate=loop, do_sample=False, max_new_tokens=4, pad_token_id=0, **given)
        found.append((ids, cache.get_seq_length()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
