"""A cascade reads few bits first and more where the margin is thin, and each sample as it would be read alone."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import foveate as fv
from foveate.errors import BudgetError, DataError, FoveateError
from foveate.inputs.cascading import CascadeVerdict
from foveate.inputs.margins import cascade_plan, margins, static_plan, wanted
from tiny import generator, mlp, rows


def _random(maps: int, samples: int, seed: int) -> tuple[Tensor, Tensor, list[float]]:
    g = generator(seed)
    right = torch.rand(maps, samples, generator=g) < torch.linspace(1.0, 0.5, maps)[:, None]
    thin = torch.randint(0, 8, (maps, samples), generator=g) / 4  # so that some are equal
    return right, thin, [8.0 - i for i in range(maps)]


def _cheapest(right: Tensor, thin: Tensor, bits: list[float], pair: tuple[int, int], need: float) -> float:
    """The fewest bits of two maps that show enough, by trying every threshold."""
    low, high = pair
    best = math.inf
    for threshold in [-math.inf, *sorted({float(v) + 1e-6 for v in thin[low]})]:
        again = thin[low] < threshold
        shown = float(torch.where(again, right[high], right[low]).double().mean())
        if shown >= need - 1e-9:
            best = min(best, bits[low] + float(again.double().mean()) * bits[high])
    return best


@given(st.integers(1, 4), st.integers(2, 40), st.sampled_from([0.3, 0.6, 0.8, 0.95]), st.integers(0, 1 << 30))
def test_no_pair_of_maps_and_no_threshold_is_cheaper(maps: int, samples: int, agreement: float, seed: int) -> None:
    right, thin, bits = _random(maps, samples, seed)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    pairs = [(low, high) for low in range(maps) for high in range(low)]
    need = wanted(agreement, samples // 2)
    first = {p: _cheapest(right[:, even], thin[:, even], bits, p, agreement) for p in pairs}
    able = [
        p for p in pairs if first[p] < math.inf and _cheapest(right[:, odd], thin[:, odd], bits, p, need) < math.inf
    ]
    found = cascade_plan(right, thin, bits, agreement)
    if found is None:
        assert not able
        return
    pair = (found.low, found.high)
    assert first[pair] == pytest.approx(min(first[p] for p in able))
    assert found.bits == pytest.approx(_cheapest(right[:, odd], thin[:, odd], bits, pair, need))
    again = thin[found.low, odd] < found.threshold
    assert float(again.double().mean()) == pytest.approx(found.share)
    shown = float(torch.where(again, right[found.high, odd], right[found.low, odd]).double().mean())
    assert shown == pytest.approx(found.agreement)
    assert shown >= need - 1e-9


def test_a_single_sample() -> None:
    right, thin = torch.tensor([[True], [False]]), torch.tensor([[3.0], [1.0]])
    found = cascade_plan(right, thin, [8.0, 2.0], 0.9)
    assert found is not None
    assert (found.low, found.high, found.share, found.bits) == (1, 0, 1.0, 10.0)
    assert static_plan(right, [8.0, 2.0], 0.9) is not None


def test_the_cheapest_single_map_shows_enough() -> None:
    right = torch.tensor([[1] * 200, [1] * 198 + [0] * 2, [1] * 160 + [0] * 40]).bool()
    bits = [8.0, 4.0, 2.0]
    assert static_plan(right, bits, 0.9) is not None
    assert [static_plan(right, bits, a).low for a in (0.7, 0.9, 0.999)] == [2, 1, 0]  # type: ignore[union-attr]
    assert static_plan(right[1:], bits[1:], 0.999) is None


def test_margins_are_of_the_two_greatest() -> None:
    assert margins(torch.tensor([[1.0, 4.0, 2.5], [7.0, 7.0, -1.0]])).tolist() == [1.5, 0.0]
    with pytest.raises(BudgetError, match="C from 2 on"):
        margins(torch.zeros(3, 1))


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    model = mlp()
    original = copy.deepcopy(model)
    fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    batches = [torch.randn(50, 70, generator=generator(10 + i)) for i in range(12)]
    return model, original, batches


@pytest.fixture
def classifier(made: tuple[nn.Module, nn.Module, list[Tensor]]) -> Iterator[tuple[nn.Module, nn.Module, list[Tensor]]]:
    yield made
    fv.apply(made[0], fv.profile_of(made[0]).uniform(8))


def test_each_sample_is_read_as_it_would_be_alone(classifier: tuple[nn.Module, nn.Module, list[Tensor]]) -> None:
    model, original, batches = classifier
    before = fv.state_of(model)
    with (
        torch.no_grad(),
        fv.cascade(model, batches=batches, agreement=0.97, reference=original, progress=False) as made,
    ):
        assert made.high < made.low
        assert made.frontier.bits(made.low) < made.frontier.bits(made.high)
        x = torch.randn(64, 70, generator=generator(99))
        found = made(x)
        share = made.share
        assert 0 < share < 1
        assert made.bits == pytest.approx(made.frontier.bits(made.low) + share * made.frontier.bits(made.high))
        assert model(x).shape == found.shape  # the model itself is read as before
        with fv.row_precision(model, [fv.Request(tier=made.low)] * 64):
            first = model(x)
        with fv.row_precision(model, [fv.Request(tier=made.high)] * 64):
            second = model(x)
        thin = margins(first) < made.threshold
        assert float(thin.double().mean()) == share
        assert torch.equal(found, torch.where(thin[:, None], second, first))
        alone = torch.cat([made(row[None]) for row in x])
        assert torch.equal(alone, found)
        assert made.verdict is not None
        assert made.verdict.samples == 150
        assert str(made.verdict) in str(made)
    assert fv.state_of(model).frontiers.keys() == before.frontiers.keys()
    assert not fv.state_of(model).requests
    with pytest.raises(FoveateError, match="was closed"):
        made(x)


def test_it_meets_the_agreement_that_was_asked_for(classifier: tuple[nn.Module, nn.Module, list[Tensor]]) -> None:
    model, original, batches = classifier
    x = torch.randn(3000, 70, generator=generator(7))
    with torch.no_grad():
        wanted_n = original(x).argmax(1)
        shares = []
        for agreement in (0.8, 0.9, 0.97):
            with fv.cascade(
                model, batches=batches, agreement=agreement, reference=original, verdict=False, progress=False
            ) as made:
                assert made.verdict is None
                assert float((made(x).argmax(1) == wanted_n).double().mean()) > agreement - 0.02
                shares.append(made.bits)
    assert shares == sorted(shares)


def test_two_threads_and_other_rows(classifier: tuple[nn.Module, nn.Module, list[Tensor]]) -> None:
    model, _, batches = classifier
    x = torch.randn(40, 70, generator=generator(5))
    with fv.cascade(model, batches=batches, agreement=0.9, verdict=False, progress=False) as made:
        with torch.no_grad():
            expected = made(x)
            found: list[Tensor] = []

            def work() -> None:
                with torch.no_grad():
                    found.extend(made(x) for _ in range(20))

            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == 40
        assert all(torch.equal(one, expected) for one in found)


def test_cascades_end_in_any_order_and_floors_count(classifier: tuple[nn.Module, nn.Module, list[Tensor]]) -> None:
    model, original, batches = classifier
    x = batches[0]

    def made(agreement: float) -> fv.Cascade:
        return fv.cascade(
            model, batches=batches, agreement=agreement, reference=original, verdict=False, progress=False
        )

    with torch.no_grad():
        first, second = made(0.9), made(0.97)
        expected = second(x)
        first.close()
        assert torch.equal(second(x), expected)
        share = second.bits
        with fv.floor(model, bits=7):
            second(x)
            second(x)
        assert second.bits > share
        second.close()


def test_the_single_map_of_the_verdict_is_the_cheapest(
    classifier: tuple[nn.Module, nn.Module, list[Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    model, original, batches = classifier
    with fv.cascade(model, batches=batches, agreement=0.95, reference=original, progress=False) as made:
        verdict = made.verdict
    assert verdict is not None
    assert verdict.asked == 0.95
    chain = made.frontier
    alone = min(range(len(chain)), key=lambda i: abs(chain.bits(i) - verdict.static_bits))
    assert chain.bits(alone) == verdict.static_bits
    seen = torch.cat([batch for i, batch in enumerate(batches) if i % 4 != 3])[1::2]
    with torch.no_grad():
        wanted_n = original(seen).argmax(1)
        fv.apply(model, chain[alone + 1])
        shown = float((model(seen).argmax(1) == wanted_n).double().mean())
    assert shown < wanted(0.95, len(seen))  # one map further is not enough
    with fv.cascade(model, batches=batches[:2], agreement=0.95, verdict=False, progress=False):
        assert "100 samples are few for an agreement of 0.95" in capsys.readouterr().err


def test_a_broken_promise_does_not_pay() -> None:
    found = CascadeVerdict(
        agreement=0.9, bits=3.0, static_agreement=0.99, static_bits=4.0, share=0.1, samples=1000, asked=0.99
    )
    assert found.ratio < 1
    assert not found.pays
    assert "the agreement of 0.99 is not kept" in str(found)


def test_what_is_no_classifier_is_refused_at_once() -> None:
    model = nn.Sequential(nn.Linear(70, 32), nn.Linear(32, 8))
    batches = [torch.randn(4, 5, 70, generator=generator(i)) for i in range(4)]
    fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    with pytest.raises(BudgetError, match="20 rows of logits for 4 samples"):
        fv.cascade(model, batches=batches, progress=False)


def test_an_encoder_with_keywords() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=60, num_labels=4
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.classifier.weight.data.mul_(20)

    def batch(seed: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 60, (16, 9), generator=generator(seed))
        return {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.arange(16)[:, None] % 9 + 1).long()}

    batches = [batch(i) for i in range(8)]
    fv.quantize(model, batches, objective=fv.Logits(), progress=False)
    with torch.no_grad(), fv.cascade(model, batches=batches, agreement=0.8, progress=False) as made:
        found = made(**batch(50))
        assert found.shape == (16, 4)
        ones = [made(**{k: v[i : i + 1] for k, v in batch(50).items()}) for i in range(16)]
        assert torch.allclose(torch.cat(ones), found, atol=1e-5)


def test_what_it_refuses(classifier: tuple[nn.Module, nn.Module, list[Tensor]]) -> None:
    model, original, batches = classifier

    def made(**changes: Any) -> fv.Cascade:
        given: dict[str, Any] = {"batches": batches, "progress": False, "reference": original, **changes}
        return fv.cascade(model, **given)

    with pytest.raises(DataError, match="there are no batches"):
        made(batches=[])
    for agreement in (0, 1.5, -1.0, math.nan):
        with pytest.raises(BudgetError, match="is not a part of the samples"):
            made(agreement=agreement)
    with pytest.raises(BudgetError, match="is more than any map shows"):
        made(agreement=1.0, reference=mlp(seed=5))
    before = fv.state_of(model)
    with made(agreement=0.9, verdict=False) as found:
        with pytest.raises(DataError, match="no argument is a tensor"):
            found(3)
        fv.apply(model, fv.frontier(fv.profile_of(model), 5), decider="other")
        with pytest.raises(FoveateError, match="not in force any more"):
            found(batches[0])
        fv.withdraw(model, "other")
        found(batches[0])
    assert fv.state_of(model).frontiers.keys() == before.frontiers.keys()
