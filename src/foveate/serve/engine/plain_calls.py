"""Plain calls of a model that is served: between two steps, without the cache in pages that steps share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from foveate.nn.levels import row_precision
from foveate.precision.state import Request
from foveate.serve.engine.sampling import Chosen, with_logprobs

#: Tokens whose log probabilities are computed at a time: a row of logits has the size of the vocabulary.
_SLICE = 128


@contextmanager
def without_pages(model: Any) -> Iterator[None]:
    """Plain calls of a model that continuous batching has prepared for a cache in pages."""
    name = getattr(model.config, "_attn_implementation", None) or ""
    plain = name.removeprefix("paged|")
    if plain == name:
        yield
        return
    model.set_attn_implementation(plain)
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def prompt_logprobs(model: Any, tokens: Sequence[int], request: Request | None, count: int) -> list[Chosen]:
    """The log probabilities of a prompt's tokens, of which the first has none.

    Args:
        model: the model that is served.
        tokens: the prompt.
        request: the precision that its rows ask for; None follows the index in force.
        count: how many alternatives each token names.
    """
    found = [Chosen(token=tokens[0])]
    precision = nullcontext() if request is None else row_precision(model, [request])
    with without_pages(model), torch.no_grad(), precision:
        logits_TV = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, :-1]
    for start in range(0, len(logits_TV), _SLICE):
        part = logits_TV[start : start + _SLICE].float()
        found += [with_logprobs(token, row, count) for token, row in zip(tokens[start + 1 :], part, strict=False)]
    return found
