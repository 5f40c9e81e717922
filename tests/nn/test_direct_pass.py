"""The pass of one token without transformers' forward: the same tokens, and only where it is the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.nn.decoder.direct import DirectPass
from nn.decoders import FAMILIES, model_of
from tiny import generator, quantized_llama

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (1, 5), generator=generator(4))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each token that was asked of a direct pass, whether it gave one."""
    asked: list[bool] = []
    call = DirectPass.__call__

    def counted(self: DirectPass, token: Tensor, cache: Any) -> Tensor | None:
        found = call(self, token, cache)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(DirectPass, "__call__", counted)
    return asked


class _Streamer:
    """Does something after so many tokens."""

    def __init__(self, after: int, what: Callable[[], object]) -> None:
        self.seen, self._after, self._what = 0, after, what

    def put(self, value: Tensor) -> None:
        self.seen += 1
        if self.seen == self._after:
            self._what()

    def end(self) -> None:
        """Nothing."""


def _generate(model: Any, streamer: Any = None, count: int = 8, ids: Tensor = IDS, usual: bool = False) -> Tensor:
    """The tokens of the short loop, or of transformers' own."""
    made: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=None if usual else functools.partial(fv.decoding_loop, streamer=streamer),
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return made


def _usual(model: Any, count: int = 8, ids: Tensor = IDS) -> Tensor:
    return _generate(model, count=count, ids=ids, usual=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_usual_way(family: str, direct: list[bool]) -> None:
    model = model_of(family, **({"logits_scaling": 4.0} if family == "Granite" else {}))
    assert torch.equal(_generate(model), _usual(model))
    # the first token after the prompt is of the usual way, and compared; those that cap or scale logits stay with it
    other = bool(getattr(model.config, "final_logit_softcapping", None)) or family == "Granite"
    assert direct == ([False] if other else [False, *[True] * 6])


def test_several_sequences(direct: list[bool]) -> None:
    model, _ = quantized_llama()
    ids = torch.randint(3, 50, (3, 6), generator=generator(5))
    assert torch.equal(_generate(model, ids=ids), _usual(model, ids=ids))
    assert direct == [False, *[True] * 6]


def test_levels_that_move_between_tokens_are_read(direct: list[bool]) -> None:
    model, profile = quantized_llama()
    low = profile.uniform(2)

    def two() -> None:
        fv.apply(model, low)

    fv.apply(model, profile.uniform(8))
    moved = _generate(model, _Streamer(4, two))
    assert direct == [False, *[True] * 6]
    fv.apply(model, profile.uniform(8))
    expected = _usual(model, 4)
    cache = transformers.DynamicCache(config=model.config)
    model(IDS, cache=cache, use_cache=True)
    for token in expected[0, IDS.shape[1] : -1]:
        model(token.view(1, 1), cache=cache, use_cache=True)
    two()
    token = expected[:, -1:]
    for place in range(4):
        token = model(token, cache=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        assert int(token) == int(moved[0, IDS.shape[1] + 4 + place])


@pytest.mark.parametrize("where", ["model", "decoder", "layer", "head", "everywhere"])
def test_a_hook_that_comes_between_tokens_is_called(where: str, direct: list[bool]) -> None:
    model, _ = quantized_llama()
    seen: list[str] = []
    handles: list[Any] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(type(module).__name__)

    def put() -> None:
        if where == "everywhere":
            handles.append(nn.modules.module.register_module_forward_hook(hook))
            return
        place = {"model": model, "decoder": model.model, "layer": model.model.layers[0], "head": model.lm_head}[where]
        handles.append(place.register_forward_hook(hook))

    expected = _usual(model)
    try:
        assert torch.equal(_generate(model, _Streamer(4, put)), expected)
    finally:
        handles[0].remove()
    assert len(seen) >= 4
    assert direct[:4] == [False, True, True, False]
    direct.clear()
    assert torch.equal(_generate(model), expected)  # and again when it has gone
    assert direct == [False, *[True] * 6]


def test_a_module_that_is_replaced_between_tokens_is_called(direct: list[bool]) -> None:
    model, _ = quantized_llama()
    layer = model.model.layers[1]

    class Louder(nn.Module):
        """A norm that counts its calls."""

        calls = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            """As the norm, and one call more."""
            Louder.calls += 1
            found: Tensor = self.inner(x)
            return found

    def replace() -> None:
        layer.input_layernorm = Louder(layer.input_layernorm)

    expected = _usual(model)
    assert torch.equal(_generate(model, _Streamer(4, replace)), expected)
    assert Louder.calls == 4


def test_positions_or_masks_that_a_model_makes_itself_are_not_left_out(direct: list[bool]) -> None:
    model, _ = quantized_llama()
    own = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc]
        """Gives its decoder positions of its own, as models of images do."""

        def forward(self, input_ids: Any = None, position_ids: Any = None, **given: Any) -> Any:
            """Positions begin at 3."""
            cache = given.get("cache", given.get("past_key_values"))
            begin = 3 + (0 if cache is None else cache.get_seq_length())
            positions = torch.arange(begin, begin + input_ids.shape[1])[None]
            return own(self, input_ids=input_ids, position_ids=positions, **given)

    model.__class__ = Shifted
    assert torch.equal(_generate(model), _usual(model))
    assert direct == [False]
