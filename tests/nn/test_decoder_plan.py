"""What a thread keeps of a decoder's last call is used where it is still true, and nowhere else."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate as fv
from foveate.nn.foreign.cache_argument import cache_argument
from foveate.nn.registry import registry_of
from foveate.precision.maps import uniform
from nn.decoders import forward_of, model_of
from tiny import generator, quantized_llama

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(fv.backends()[0].runs is False, reason="no compiled kernels")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _in_a_new_thread(*call: Any) -> Tensor:
    """What `_logits` gives in a thread that has kept nothing."""
    found: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.append(_logits(*call))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def _logits(model: Any, ids: Tensor, cached: Tensor | None) -> Tensor:
    """Of some tokens, after others that are in a cache."""
    calls = forward_of(model).fused_calls
    cache = transformers.DynamicCache(config=model.config)
    if cached is not None:
        model(input_ids=cached, use_cache=True, **cache_argument(model, cache))
    logits: Tensor = model(input_ids=ids, use_cache=True, **cache_argument(model, cache)).logits
    assert forward_of(model).fused_calls == calls + 1 + (cached is not None)
    return logits


@pytest.mark.parametrize("seed", range(3))
def test_calls_in_any_order_give_what_they_give_by_themselves(seed: int) -> None:
    choice = random.Random(seed)
    models = [model_of("Llama"), model_of("Qwen3Moe"), model_of("Gemma2")]
    for model in models:
        registry = registry_of(model)
        maps = [uniform(registry.sites, level, registry.other_bytes) for level in (2, 4, 8)]
        model.maps = maps
    before: tuple[Any, Tensor, Tensor | None] | None = None
    for _ in range(40):
        if before is None or choice.random() < 0.5:
            model = choice.choice(models)
            rows, length = choice.choice([(1, 1), (1, 1), (1, 4), (3, 1), (2, 300)])
            ids = torch.randint(3, 101, (rows, length), generator=generator(choice.randrange(99)))
            cached = torch.randint(3, 101, (rows, choice.randint(1, 290)), generator=generator(5))
            before = (model, ids, cached if length < 300 and choice.random() < 0.5 else None)
        model, ids, cached = before
        if choice.random() < 0.4:
            fv.apply(model, choice.choice(model.maps))
        found = _logits(model, ids, cached)
        assert torch.equal(found, _in_a_new_thread(model, ids, cached))


def _planes(model: Any) -> list[Any]:
    return [w.value for w in registry_of(model).weights.values()]


def test_memory_that_was_moved_is_found() -> None:
    model, ids = model_of("Llama"), torch.tensor([[5]])
    expected = _logits(model, ids, None)
    for weight in _planes(model):
        for tensor in (*weight.planes, weight.scales, weight.gain, weight.stored_levels, weight.tile_offsets):
            tensor.share_memory_()
    assert torch.equal(_logits(model, ids, None), expected)
    for norm in (model.model.norm, model.model.layers[0].input_layernorm):
        norm.weight.share_memory_()
    assert torch.equal(_logits(model, ids, None), expected)


@pytest.mark.parametrize("what", ["planes", "scales", "gain", "stored_levels", "tile_offsets"])
def test_memory_that_is_gone_is_an_error(what: str) -> None:
    model, ids = model_of("Llama"), torch.tensor([[5]])
    _logits(model, ids, None)
    held = getattr(_planes(model)[3], what)
    tensor = held[0] if what == "planes" else held
    tensor.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(input_ids=ids)


def test_a_weight_that_is_replaced_is_read() -> None:
    (model, _), ids = quantized_llama(), torch.tensor([[5]])
    before = _logits(model, ids, None)
    weights = registry_of(model).weights
    first, second = (weights[f"model.layers.{i}.mlp.down_proj:weight"] for i in range(2))
    value = first.value
    first.set(second.value)
    for user in first.users:
        user.renew()
    assert not torch.equal(_logits(model, ids, None), before)
    first.set(value)
    for user in first.users:
        user.renew()
    assert torch.equal(_logits(model, ids, None), before)


def test_decoders_come_and_go() -> None:
    for seed in range(6):
        model, ids = model_of("Llama", num_hidden_layers=1 + seed % 2), torch.tensor([[5 + seed]])
        found = _logits(model, ids, None)
        assert torch.equal(found, _in_a_new_thread(model, ids, None))
        del model
