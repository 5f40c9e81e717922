"""Targets in bits, bytes and seconds: the mean meets each, and weights are priced by what they cost in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.errors import BudgetError
from foveate.formats.levels import WEIGHT_LEVELS
from foveate.inputs.adapt import static_map
from foveate.inputs.explain import chosen_maps
from foveate.nn.registry import registry_of
from foveate.precision.costs import Bits, BytesRead, Seconds
from inputs.choosing import QUIET, data
from tiny import mlp, quantized_llama, rows, tokens


def _timed(model: nn.Module, profile: fv.Profile, free: str) -> fv.Timings:
    """Times by which planes of one weight are free, and those of the others take as long as their bytes."""
    products = {
        site.name: tuple(0.0 if site.name == free else 1e-9 * site.tiles * level for level in WEIGHT_LEVELS)
        for site in profile.weight_sites()
    }
    timings = fv.Timings(machine="a test's", products=products, rest=1e-6)
    registry_of(model).profile = replace(profile, timings=timings)
    return timings


def test_bytes_decide_as_bits_where_a_token_reads_all_weights(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, profile = quantized
    x, found = torch.cat(data(9)), []
    weights = sum(site.weights for site in profile.weight_sites())
    plan = static_map(profile, Bits(), 4.5)
    per_bit = weights / 8
    target = plan.bytes_read + (4.5 - plan.bits) * per_bit
    for asked in ({"bits": 4.5}, {"bytes": round(target)}):
        with fv.adapt_to_input(model, **asked, batches=data(), options=QUIET, progress=False) as adapted:  # type: ignore[arg-type]
            found.append(model(x))
            adapted.correct()
            bits, spent = adapted.bits, adapted.spent
    assert bits == pytest.approx(4.5, rel=0.02)
    assert spent == pytest.approx(target + (bits - 4.5) * per_bit, rel=1e-3)
    assert float((found[0] != found[1]).any(1).float().mean()) < 0.05  # a byte is not a whole number of bits
    assert "on average, between" in str(adapted)


def test_bytes_of_a_token_count_one_row_of_an_embedding() -> None:
    model, profile = quantized_llama(vocab_size=600, tie_word_embeddings=False)
    plan = fv.allocate(profile, fv.Budget(bits=5.0))
    with fv.adapt_to_input(
        model, bytes=plan.bytes_read, batches=tokens(8, 24), options=QUIET, progress=False
    ) as adapted:
        with torch.no_grad():
            model(**tokens(8, 24)[0])
        _, bits, spent = adapted.tally()
        assert spent == pytest.approx(plan.bytes_read, rel=0.02)
        low, high = chosen_maps(model)
        costs = adapted.adaptation.estimator.between(low, high).costs
        assert costs == BytesRead().between(low, high)
        assert sum(costs.values()) == pytest.approx(high.bytes_read - low.bytes_read, abs=1)
        assert low.bits <= bits <= high.bits
    static = static_map(profile, BytesRead(), plan.bytes_read)
    assert static.bytes_read == pytest.approx(plan.bytes_read, rel=0.01)


def test_planes_that_take_no_time_are_read_first() -> None:
    model = mlp((96, 64, 48, 10))
    profile = fv.quantize(model, rows(64, 96), objective=fv.Logits(), progress=False)
    timings = _timed(model, profile, "2:weight")
    fv.apply(model, fv.frontier(profile, 160))  # by bytes: the free weight differs between the two maps
    seconds = timings.seconds_of(fv.allocate(profile, fv.Budget(bits=4.5)))
    with fv.adapt_to_input(model, seconds=seconds, batches=data(), options=QUIET, progress=False) as adapted:
        found = fv.explain(model, torch.cat(data()[:3]))
        assert adapted.tally().spent == pytest.approx(seconds, rel=0.01)
        layers = {layer.site: layer for layer in found.layers}
        assert layers["2:weight"].threshold == 0
        assert bool((layers["2:weight"].reads_high | (layers["2:weight"].estimated == 0)).all())
        assert layers["0:weight"].threshold > 0
        low, high = chosen_maps(model)
        costs = Seconds(timings).between(low, high)
        assert costs["2:weight"] == 0
        assert sum(costs.values()) == pytest.approx(timings.seconds_of(high) - timings.seconds_of(low))
        assert adapted.verdict is None
    assert static_map(replace(profile, timings=timings), Seconds(timings), seconds).predicted_loss > 0


def test_a_verdict_beside_the_static_map_of_the_same_time(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, profile = quantized
    timings = _timed(model, profile, "none")
    seconds = timings.seconds_of(fv.allocate(profile, fv.Budget(bits=4.5)))
    with fv.adapt_to_input(model, seconds=f"{seconds * 1e6}us", batches=data(), progress=False) as adapted:
        assert adapted.verdict is not None
        assert adapted.verdict.samples == 32
        assert adapted.correction.target == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give exactly one of bits, bytes and seconds; given: none"),
        ({"bits": 4.5, "bytes": 1000}, "given: bits, bytes"),
        ({"seconds": "1ms"}, "the profile has no times"),
        ({"bits": float("nan")}, r"budget bits \(=nan\) must be a positive finite number"),
        ({"bytes": "much"}, r"size \(='much'\) is not a number of bytes"),
        ({"bytes": "1GiB"}, "a target of 1.00 GiB a token has no maps 0.25 bits around it on the frontier"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], message: str) -> None:
    model = mlp((96, 64, 10))
    fv.quantize(model, rows(64, 96), objective=fv.Logits(), progress=False)
    with pytest.raises(BudgetError, match=message):
        fv.adapt_to_input(model, **wrong, batches=data(), progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"spread": 0.0}, r"spread \(=0.0\) is not a positive number of bits"),
        ({"spread": float("nan")}, r"spread \(=nan\) is not a positive number of bits"),
        ({"strips": 0}, r"strips \(=0\) is not a whole number from 1 on"),
        ({"strips": 1.5}, r"strips \(=1.5\) is not a whole number from 1 on"),
    ],
)
def test_options_check_themselves(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        fv.AdaptOptions(**wrong)
