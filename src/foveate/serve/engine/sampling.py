"""Sampler: the next token of each row, by its own request's temperature, penalties and seed.

transformers' continuous batching takes temperature and top_p from the first request for all. Here each row has its own,
and a generator of its own, so an answer with a seed does not depend on what is computed beside it.

Shapes: V words of the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.serve.calls.fields import Sampling


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A token of an answer.

    Attributes:
        token: its id.
        logprob: the log of the probability that the model gives it, before temperature; None if not asked for, and for
            the first token of a prompt.
        alternatives: the likeliest tokens with their log probabilities.
    """

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True)
class Sampler:
    """Chooses the tokens of one answer.

    Attributes:
        sampling: how.
        counts: how often the answer has each token.
        generator: of random numbers; made when the first is needed.
    """

    sampling: Sampling
    counts: Counter[int] = field(default_factory=Counter)
    generator: torch.Generator | None = None

    def choose(self, logits_V: Tensor) -> Chosen:
        """The next token by logits, float32 [V], which are not changed."""
        how = self.sampling
        adjusted_V = self._adjusted(logits_V)
        token = int(adjusted_V.argmax()) if how.temperature == 0 else self._drawn(adjusted_V / how.temperature)
        self.counts[token] += 1
        return Chosen(token=token) if how.logprobs is None else with_logprobs(token, logits_V, how.logprobs)

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        """Logits with penalties and biases; a token beyond the vocabulary has no bias."""
        how = self.sampling
        penalized = how.presence_penalty or how.frequency_penalty
        if not how.bias and not (penalized and self.counts):
            return logits_V
        adjusted_V = logits_V.clone()
        for token, amount in how.bias.items():
            if token < len(adjusted_V):
                adjusted_V[token] += amount
        if penalized:
            for token, count in self.counts.items():
                adjusted_V[token] -= how.presence_penalty + count * how.frequency_penalty
        return adjusted_V

    def _drawn(self, logits_V: Tensor) -> int:
        how = self.sampling
        if self.generator is None:
            self.generator = torch.Generator()
            if how.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(how.seed)
        if how.top_k and how.top_k < len(logits_V):
            values, tokens = logits_V.topk(how.top_k)
        elif how.top_p < 1:
            values, tokens = logits_V.sort(descending=True)
        else:
            return int(torch.multinomial(logits_V.softmax(-1), 1, generator=self.generator))
        probabilities = values.softmax(-1)
        # the first token always stays: what lies before it is no probability at all
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= max(how.top_p, 1e-9), 0.0)
        return int(tokens[torch.multinomial(probabilities, 1, generator=self.generator)])


def with_logprobs(token: int, logits_V: Tensor, count: int) -> Chosen:
    """A token with its log probability by logits, float32 [V], and those of the `count` likeliest ones."""
    logprobs_V = logits_V.log_softmax(-1)
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Chosen(token=token, logprob=float(logprobs_V[token]), alternatives=pairs)
