"""A cache is handed on by the name that the callee has for it, and nobody is warned."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

import foveate as fv
from foveate.nn.foreign.cache_argument import cache_argument, cache_of
from tiny import llama


class Older(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any: ...


class Newer(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> Any: ...


class Wrapper(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


def renamed(function: Any) -> Any:
    """As transformers wraps what takes an old name too."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapped


def test_the_signature_has_the_name() -> None:
    cache = object()
    assert cache_argument(Older(), cache) == {"past_key_values": cache}
    assert cache_argument(Newer(), cache) == {"cache": cache}
    assert cache_argument(Older().forward, None) == {"past_key_values": None}
    assert cache_argument(renamed(Newer.forward), None) == {"cache": None}


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_callee_of_any_keyword_takes_the_name_of_the_installed_release(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"cache": Newer, "past_key_values": Older}[name]
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", kind.forward)
    for callee in (Wrapper(), llama().generate):
        assert cache_argument(callee, None) == {name: None}


@pytest.mark.filterwarnings("error")
def test_the_installed_release_takes_it_and_gives_it_back_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    ids = torch.tensor([[3, 4, 5]])
    given = DynamicCache(config=model.config)
    with torch.no_grad():
        output = model(ids, **cache_argument(model, given), use_cache=True)
        assert cache_of(output) is given
        assert given.get_seq_length() == 3
        fresh = model(ids, **cache_argument(model, None), use_cache=True)
        assert cache_of(fresh).get_seq_length() == 3
    empty = cache_argument(model.generate, DynamicCache(config=model.config))
    generated = model.generate(ids, **empty, max_new_tokens=1)
    assert generated.shape == (1, 4)
    assert "past_key_values" not in caplog.text


def test_outputs_of_either_release_hold_it() -> None:
    cache = object()
    assert cache_of({"logits": None, "past_key_values": cache}) is cache
    assert cache_of({"logits": None, "cache": cache}) is cache
    for without in (BaseModelOutput(torch.ones(1)), CausalLMOutputWithPast(logits=torch.ones(1)), (torch.ones(1),)):
        with pytest.raises(fv.DataError, match="holds no key/value cache"):
            cache_of(without)
