"""The benchmark of importance on models and texts that are far too small to gain anything: its parts fit together."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import foveate as fv
from foveate.bench.importance import mixture, sparsity, stream
from foveate.errors import DataError
from foveate.importance.tags import zero_share

RECIPE = mixture.Recipe(experts=4, width=32, hidden=32, layers=1, heads=2, window=24, batch=4, steps=2)
LENGTHS = stream.Lengths(batches=2, windows=2, window=24, calibration=2, oracle=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, mixture.Text]:
    folder = tmp_path_factory.mktemp("texts")
    g = torch.Generator().manual_seed(0)
    for number, names in enumerate(mixture.TEXTS.values()):
        for name in set(names):
            letters = torch.randint(32 * number, 32 * number + 32, (1 << 15,), generator=g, dtype=torch.uint8)
            (folder / name).write_bytes(letters.numpy().tobytes())
    return mixture.texts(folder)


@pytest.fixture(scope="module")
def one(sources: dict[str, mixture.Text], tmp_path_factory: pytest.TempPathFactory) -> stream.Subject:
    pytest.importorskip("transformers")
    cache = tmp_path_factory.mktemp("cache")
    model = mixture.trained(RECIPE, sources, cache)
    kept = mixture.trained(RECIPE, sources, cache)
    assert len(list(cache.iterdir())) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name])
    return stream.subject(model, sources, LENGTHS)


def test_texts_are_read_and_split(sources: dict[str, mixture.Text], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(sources) == set(mixture.TEXTS)
    assert len(sources["stories"].train) + len(sources["stories"].held_out) == 1 << 15
    assert len(sources["c"].train) == len(sources["c"].held_out) == 1 << 15
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    with pytest.raises(DataError, match="set FOVEATE_DATA"):
        mixture.texts()
    with pytest.raises(DataError, match="cannot be read"):
        mixture.texts(Path("nowhere"))


def test_streams_give_figures_of_equal_bytes(one: stream.Subject, sources: dict[str, mixture.Text]) -> None:
    budget = fv.Budget(bits=4.5)
    maps = stream.oracles(one, sources, budget, LENGTHS)
    static = fv.allocate(one.profile, budget)
    assert all(abs(plan.bits - static.bits) < 0.1 for plan in maps.values())
    figures, rows = stream.measure_streams(one, sources, 4.5, [("stories", "c")], LENGTHS)
    assert [row["text"] for row in rows] == ["stories", "c", "stories"]
    assert figures["online_over_static_mixed_kl_low"] <= figures["online_over_static_mixed_kl"] * (1 + 1e-6)
    assert figures["online_over_static_mixed_kl_high"] >= figures["online_over_static_mixed_kl"] * (1 - 1e-6)
    assert all(math.isfinite(row[label]) and row[label] > 0 for row in rows for label in ("online", "static", "oracle"))
    assert list(fv.state_of(one.model).frontiers) == ["user"]


def test_zeros_are_at_least_the_share_that_is_asked_for(one: stream.Subject) -> None:
    budget = fv.Budget(bits=4.0)
    plan = sparsity.with_zeros(one.profile, budget, 0.2)
    assert zero_share(plan) >= 0.2
    assert plan.bits <= 4.0 + 1e-6


def test_dropped_tiles_take_no_memory_and_change_no_output() -> None:
    figures = sparsity.measure_half_zero(size=512, copies=1, rounds=1)
    assert figures["half_zero_same_outputs"] == 1
    assert 0.45 < figures["half_zero_memory"] < 0.6
