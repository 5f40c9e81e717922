"""Samplers of rows: each has its own temperature, cuts, penalties and seed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.serve.calls.fields import Sampling
from foveate.serve.engine.sampling import Sampler

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.9])


def _tokens(sampling: Sampling, count: int = 400) -> Counter[int]:
    return Counter(
        Sampler(sampling=Sampling(**{**vars(sampling), "seed": seed})).choose(LOGITS).token for seed in range(count)
    )


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(_tokens(Sampling(temperature=0), 3)) == {1}


def test_shares_are_those_of_the_softmax() -> None:
    found = _tokens(Sampling(temperature=1.0), 2000)
    expected = LOGITS.softmax(-1)
    # four standard errors of a share of 2000 draws
    for token, share in enumerate(expected.tolist()):
        assert found[token] / 2000 == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


@given(top_k=st.integers(1, 5), top_p=st.floats(0.0, 1.0), seed=st.integers(0, 2**63 - 1))
def test_cuts_leave_only_the_likeliest(top_k: int, top_p: float, seed: int) -> None:
    order = LOGITS.argsort(descending=True).tolist()
    token = Sampler(sampling=Sampling(top_k=top_k, top_p=top_p, seed=seed)).choose(LOGITS).token
    kept = LOGITS[order[:top_k]].softmax(-1)
    before = kept.cumsum(-1) - kept
    allowed = {t for t, b in zip(order, before.tolist(), strict=False) if b < max(top_p, 1e-6)}
    assert token in allowed | {order[0]}


def test_penalties_count_what_the_answer_has() -> None:
    sampler = Sampler(sampling=Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.5))
    # 1 has 2.0, then 1.0; 4 has 1.9, then 0.9; 2 has 1.0
    assert [sampler.choose(LOGITS).token for _ in range(3)] == [1, 4, 1]
    assert torch.equal(LOGITS, torch.tensor([0.0, 2.0, 1.0, -1.0, 1.9]))


def test_biases_beyond_the_vocabulary_do_nothing() -> None:
    assert Sampler(sampling=Sampling(temperature=0, bias={3: 100.0, 99: 100.0})).choose(LOGITS).token == 3


def test_log_probabilities_are_before_temperature_and_bias() -> None:
    got = Sampler(sampling=Sampling(temperature=0, bias={3: 50.0}, logprobs=2)).choose(LOGITS)
    expected = LOGITS.log_softmax(-1)
    assert got.token == 3
    assert got.logprob == pytest.approx(float(expected[3]))
    assert got.alternatives == ((1, pytest.approx(float(expected[1]))), (4, pytest.approx(float(expected[4]))))
