"""A frontier is measured as maps are, its times are of this machine, and the model is left as it was."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.errors import BudgetError, DataError, PlaneNotResidentError, SiteError
from foveate.evaluate import timings as timing
from foveate.evaluate.machine import machine_name
from foveate.formats.levels import WEIGHT_LEVELS
from foveate.kernels.threads import threads
from foveate.precision.timings import Timings
from tiny import mlp, quantized_llama, quantized_mlp, rows, tokens

HELD_OUT = rows(50, 70, 4, seed=9)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short timings: these tests do not look at how long anything takes."""
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr(timing, "ROUNDS", 1)


def test_points_are_what_measure_finds() -> None:
    model, profile = quantized_mlp()
    original, before = mlp(), profile.uniform(3)
    fv.apply(model, before)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    chain = fv.measure_frontier(model, fv.frontier(profile, 20), HELD_OUT, points=5, reference=original, progress=False)
    assert fv.current_map(model) == before
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert (chain.points[0].index, chain.points[-1].index) == (0, len(chain) - 1)
    assert len(chain.points) == 5
    wanted = fv.measure(model, [chain[p.index] for p in chain.points], HELD_OUT, reference=original, progress=False)
    for point, outcome in zip(chain.points, wanted, strict=False):
        assert point.divergence == outcome.divergence
        assert point.standard_error == max(outcome.standard_error, outcome.batch_error)
        assert point.seconds is not None
        assert point.batch_seconds is not None
    assert (chain.unit, chain.machine) == ("KL, nats", machine_name())
    sizes = [chain[p.index].bytes_resident for p in chain.points]
    gaps = [a - b for a, b in itertools.pairwise(sizes)]
    assert max(gaps) < 2 * min(gaps)
    assert chain.maps == fv.frontier(profile, 20).maps


def test_without_times() -> None:
    model, profile = quantized_mlp()
    short = fv.frontier(profile, 2)
    chain = fv.measure_frontier(model, short, HELD_OUT, timed=False, progress=False)
    assert [(p.index, p.name, p.seconds, p.batch_seconds) for p in chain.points] == [
        (0, "8", None, None),
        (1, "2", None, None),
    ]
    assert chain.machine == ""
    assert chain.points[0].divergence == 0.0  # the reference is the model with every plane, as the best map is


def test_what_cannot_be_measured() -> None:
    model, profile = quantized_mlp()
    chain = fv.frontier(profile, 8)
    before = fv.current_map(model)
    wrong: list[tuple[type[Exception], str, Any]] = [
        (BudgetError, r"points \(=1\) must be a whole number of at least 2", (chain, HELD_OUT, 1)),
        (BudgetError, "is not a Frontier", (chain.maps, HELD_OUT, 4)),
        (DataError, "no batches", (chain, [], 4)),
        (DataError, "not finite", (chain, [torch.full((4, 70), math.nan)], 4)),
        (DataError, "is a Tensor", (chain, HELD_OUT[0], 4)),
        (SiteError, "of another model", (fv.frontier(quantized_mlp(group=64)[1], 8), HELD_OUT, 4)),
    ]
    for error, message, (given, data, points) in wrong:
        with pytest.raises(error, match=message):
            fv.measure_frontier(model, given, data, points=points, progress=False)
    assert fv.current_map(model) is before


def test_a_model_without_the_planes(tmp_path: Any) -> None:
    model, profile = quantized_mlp()
    fv.save(model, tmp_path / "a")
    with torch.device("meta"):
        skeleton = mlp()
    low = fv.load(tmp_path / "a", keep=4, model=skeleton)
    with pytest.raises(PlaneNotResidentError):
        fv.measure_frontier(low, fv.frontier(profile, 8), HELD_OUT, progress=False)
    chain = fv.frontier(profile, 8, fv.Constraints(levels=(2, 3, 4)))
    assert fv.measure_frontier(low, chain, HELD_OUT, points=3, progress=False).points[0].name == "4"


def test_timings_of_a_decoder() -> None:
    model, profile = quantized_llama()
    fv.apply(model, profile.uniform(3))
    found = fv.measure_timings(model, tokens()[0], progress=False)
    assert fv.current_map(model) == profile.uniform(3)
    assert fv.profile_of(model).timings is found
    assert replace(fv.profile_of(model), timings=None).losses is profile.losses
    assert found.machine == machine_name()
    assert set(found.products) == {s.name for s in profile.weight_sites()}
    assert found.levels == WEIGHT_LEVELS
    assert all(times[0] == 0.0 for times in found.products.values())
    assert set(found.products["model.embed_tokens:weight"]) == {0.0}  # it is looked up, not multiplied
    # equal shapes have equal times
    assert found.products["model.layers.0.mlp.up_proj:weight"] == found.products["model.layers.1.mlp.gate_proj:weight"]


def test_the_rest_is_what_products_leave_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, profile = quantized_mlp()
    weights = [s.name for s in profile.weight_sites()]
    timings = Timings(machine="m", products=dict.fromkeys(weights, (0.0, 0.001, 0.002, 0.003, 0.004, 0.005)), rest=0.0)

    def taken(_: Any, plans: Any, *__: Any) -> list[float]:
        assert [plan.levels[weights[0]] for plan in plans] == [8, 2]
        return [0.05, 0.04]

    monkeypatch.setattr(timing, "time_maps", taken)
    found = timing._rest(model, lambda: None, timings)
    assert found == pytest.approx(((0.05 - 3 * 0.005) + (0.04 - 3 * 0.001)) / 2)


def _rows_of_x(model: nn.Module, batch: Any) -> dict[str, float]:
    registry = timing.registry_of(model)
    with torch.no_grad():
        uses = timing._uses(registry, timing.one_at_a_time(model, batch))
    return {name: sum(shape.rows_of_x * often for shape, often in products) for name, products in uses.items()}


def _products_of(model: nn.Module, batch: Any) -> dict[str, float]:
    """How many products of one row each weight has."""
    with torch.no_grad():
        uses = timing._uses(timing.registry_of(model), timing.one_at_a_time(model, batch))
    return {name: sum(often for _, often in products) for name, products in uses.items()}


def test_products_are_counted_as_a_sample_reads_them() -> None:
    model, _ = quantized_llama()
    found = _rows_of_x(model, tokens(4, 12)[0])
    assert found.pop("model.embed_tokens:weight") == 0
    assert set(found.values()) == {1.0}  # a token with a cache, whatever the batch
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    fv.quantize(images, [torch.randn(4, 3, 6, 6)], objective=fv.Logits(), progress=False)
    assert _rows_of_x(images, torch.randn(4, 3, 6, 6)) == {"0:weight": 36.0, "3:weight": 1.0}
    tied, _ = quantized_llama(tie_word_embeddings=True)
    assert _rows_of_x(tied, tokens()[0])["model.embed_tokens:weight"] == 1.0


def test_a_mixture_counts_the_experts_that_a_token_is_routed_to() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tiny import TRANSFORMER

    torch.manual_seed(0)
    config = MixtralConfig(**TRANSFORMER, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    profile = fv.quantize(model, tokens(), progress=False)
    found = _products_of(model, tokens()[0])
    for last in ("gate_up_proj", "down_proj"):
        stack = [s for s in profile.weight_sites() if ".0.mlp.experts." in s.name and last in s.name]
        assert len(stack) == 4
        # two of the four, by the shares that calibration found
        assert sum(found[s.name] for s in stack) == pytest.approx(2.0)
        shares = [found[s.name] * s.rows / s.rows_read for s in stack]
        assert max(shares) == pytest.approx(min(shares))


def test_samples_of_any_kind_of_batch() -> None:
    assert timing._first_sample({"a": torch.ones(3, 2), "n": 5}) == {"a": pytest.approx(torch.ones(1, 2)), "n": 5}
    first = timing._first_sample((torch.ones(3), [torch.zeros(2, 4)]))
    assert (first[0].shape, first[1][0].shape) == ((1,), (1, 4))
    with pytest.raises(DataError, match="no sample"):
        timing._first_sample(torch.empty(0, 3))


def test_copies_are_as_many_as_fill_the_size() -> None:
    copies = timing._copies(32, 64, 32, 20_000)
    assert 1 < len(copies) <= 20_000 // (32 * 64) + 1
    assert len({w.planes[0].data_ptr() for w in copies}) == len(copies)
    assert len(timing._copies(32, 64, 32, 0)) == 1
    assert timing._time_product(copies, 4, torch.randn(1, 64)) > 0
    assert {int(w.active_levels.max()) for w in copies} == {4}


def test_the_machine_says_its_threads() -> None:
    with threads(1):
        assert machine_name().endswith(", 1 thread")
    with threads(2):
        assert machine_name().endswith(", 2 threads")


def _timings(**changes: Any) -> dict[str, Any]:
    return {"machine": "m", "products": {"a:weight": (0, 1, 2, 3, 4, 5)}, "rest": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rest": -1.0}, "the rest"),
        ({"rest": math.nan}, "not from 0 to"),
        ({"rest": 10**400}, "not from 0 to"),
        ({"products": {"a": (1, 2)}}, "2 times for a, not one for each"),
        ({"products": {"a": (0, 1, 2, 3, 4, math.inf)}}, "timings of a"),
        ({"products": {"a": (0, 1, 2, 3, 4, "5")}}, "timings of a"),
        ({"levels": (8, 6, 4, 3, 2, 0)}, "do not ascend"),
        ({"levels": ()}, "are not levels"),
        ({"machine": None}, "machine"),
    ],
)
def test_what_is_no_timings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Timings(**_timings(**changes))


def test_copies_of_a_model_keep_their_times() -> None:
    model, _ = quantized_mlp()
    found = fv.measure_timings(model, HELD_OUT[0], progress=False)
    assert fv.profile_of(copy.deepcopy(model)).timings == found
