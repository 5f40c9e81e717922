"""What following costs: the time of tokens that are decoded one by one, followed and not."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.importance.stream import Subject
from foveate.importance.options import TrackingOptions
from foveate.importance.track import track_importance
from foveate.nn.foreign.cache_argument import cache_argument, cache_of
from foveate.precision.budgets import Budget


def _decode(model: nn.Module, prompt: Tensor, tokens: int) -> float:
    """The seconds of so many tokens after a prompt, with a cache."""
    with torch.inference_mode():
        output: Any = model(input_ids=prompt, use_cache=True)
        last, cache = output.logits[:, -1:].argmax(-1), cache_of(output)
        started = time.perf_counter()
        for _ in range(tokens):
            output = model(input_ids=last, **cache_argument(model, cache), use_cache=True)
            last, cache = output.logits[:, -1:].argmax(-1), cache_of(output)
        return time.perf_counter() - started


def measure_overhead(one: Subject, prompt: Tensor, bits: float, tokens: int = 768, rounds: int = 9) -> dict[str, float]:
    """Time of decoding while followed, by default options, over time without.

    Each round decodes the same tokens in both ways, one after the other. Decisions are rare (every 4096 tokens) and on
    top of this; their time is measured alone and added, for each token its share.

    Args:
        one: the model.
        prompt: int64 [1, S].
        bits: the average bits of both.
        tokens: how many are decoded in a round.
        rounds: how many rounds.
    """
    budget, options = Budget(bits=bits), TrackingOptions()
    ratios, plain_times = [], []
    for number in range(rounds + 1):
        plain = _decode(one.model, prompt, tokens)
        with track_importance(one.model, budget, options=options):
            followed = _decode(one.model, prompt, tokens)
        if number:
            ratios.append(followed / plain)
            plain_times.append(plain / tokens)
    with track_importance(one.model, budget, options=options) as tracker:
        _decode(one.model, prompt, options.observe_every + 1)
        started = time.perf_counter()
        tracker._decide()
        decision = time.perf_counter() - started
    share = decision / options.decide_every / median(plain_times)
    return {
        "tracking_overhead": median(ratios) + share,
        "tracking_overhead_of_decisions": share,
        "decision_ms": decision * 1e3,
    }
