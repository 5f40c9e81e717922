"""A budget in bytes is met or refused, profiles survive a file, and settings that make no sense are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.activations.memory.peak import PeakTracker
from foveate.activations.policy.profile import profile_checksum


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())))


def _train(model: nn.Module, steps: int = 1) -> None:
    for _ in range(steps):
        model(torch.randn(512, 64)).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None


def _peak(model: nn.Module, store: fv.ActivationStore | None = None) -> float:
    held: list[Tensor] = list(model.parameters())
    with PeakTracker(held) as tracker:
        if store is None:
            _train(model)
        else:
            with store:
                _train(model)
    return float(tracker.timeline().usage({}).max())


@pytest.mark.parametrize("share", [0.75, 0.6, 0.5])
def test_the_peak_is_met_within_three_percent(share: float) -> None:
    model = _model()
    budget = int(share * _peak(model))
    store = fv.compress_activations(model, bytes=budget, options=fv.ActivationOptions(profile_every=1000))
    with store:
        _train(model, 8)
    assert _peak(model, store) <= 1.03 * budget


def test_a_peak_that_nothing_meets_is_refused_with_the_least_possible() -> None:
    model = _model()
    with fv.compress_activations(model, bytes="4KiB"), pytest.raises(fv.BudgetError, match="the least possible is"):
        _train(model, 8)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, fv.BudgetError),
        ({"error": 0.1, "levels": 4}, fv.BudgetError),
        ({"error": 0.0}, fv.BudgetError),
        ({"error": float("nan")}, fv.BudgetError),
        ({"bytes": "much"}, fv.BudgetError),
        ({"levels": 3}, fv.LevelError),
        ({"levels": {"*": 4, "head*": 64}}, fv.LevelError),
        ({"error": 0.1, "relative_to": "each parameter"}, fv.BudgetError),
        ({"error": True}, fv.BudgetError),
        ({"levels": "4"}, fv.LevelError),
        ({"levels": True}, fv.LevelError),
        ({"error": 0.1, "options": {"window": 4}}, fv.BudgetError),
        ({"bytes": 0}, fv.BudgetError),
        ({"bytes": -5}, fv.BudgetError),
        ({"error": 0.1, "profile": "nowhere.json"}, fv.CheckpointError),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        fv.compress_activations(_model(), **settings)  # type: ignore[arg-type]


def test_levels_by_pattern_and_a_pattern_that_names_nothing() -> None:
    model = _model()
    with (
        fv.compress_activations(model, levels={"0:*": 2, "*gelu*": 4, "nothing*": 8}),
        pytest.raises(fv.SiteError, match=r"'nothing\*' in levels matches none of .* like 0:saved.linear"),
    ):
        _train(model)
    outside = fv.compress_activations(model, levels={"nothing*": 8})
    with outside:
        loss = model(torch.randn(8, 16, 64)).sum()
    with pytest.raises(fv.SiteError, match="matches none"):  # backward runs outside of the store
        loss.backward()
    with fv.compress_activations(model, levels={"0:*": 2, "*gelu*": 4}) as store:
        _train(model)
    bits = {row.site: row.bits for row in store.report().rows if row.form == "grouped"}
    assert bits["0:saved.linear.0.0"] == 2
    assert {b for site, b in bits.items() if "gelu" in site} == {4}


def test_a_profile_survives_its_file_and_needs_no_learning(tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "saved.json"
    with fv.compress_activations(model, error=0.2) as store:
        _train(model, 8)
    store.save_profile(path)
    again = fv.compress_activations(model, error=0.2, profile=path)
    assert not again.planner.ledger.unprobed()
    known = {s.name: s.errors for s in store.planner.ledger.saved_sites()}
    for site in again.planner.ledger.saved_sites():
        assert site.errors == pytest.approx(known[site.name], rel=1e-5)
    with again:
        _train(model)
    assert again.report().ratio > 4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.update(foveate_saved_profile=1),
        lambda c: c["sites"].update({"x": {}}),
        lambda c: c["families"].update(x=["a"]),
        lambda c: c["families"].update(x=[float("-1")]),
        lambda c: next(iter(c["sites"].values())).update(bytes=[1]),
        lambda c: c.pop("audits"),
        lambda c: c.update(parameters="of another model"),
        lambda c: c.update(audits=[10**400]),
        lambda c: c.update(audits=[True]),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path: Path, damage: object) -> None:
    model, path = _model(), tmp_path / "saved.json"
    with fv.compress_activations(model, error=0.2) as store:
        _train(model)
    store.save_profile(path)
    content = json.loads(path.read_text())
    damage(content)  # type: ignore[operator]
    path.write_text(json.dumps({**content, "sha256": profile_checksum(content)}))
    with pytest.raises(fv.CheckpointError):
        fv.compress_activations(model, error=0.2, profile=path)


def test_a_profile_that_was_altered_or_is_nested_or_a_pipe_is_refused(tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "saved.json"
    with fv.compress_activations(model, error=0.2) as store:
        _train(model)
    store.save_profile(path)
    text = path.read_text()
    path.write_text(text.replace('"audits": [', '"audits": [0.5' + ("" if '"audits": []' in text else ","), 1))
    with pytest.raises(fv.CheckpointError, match="checksum does not match"):
        fv.compress_activations(model, error=0.2, profile=path)
    path.write_text("[" * 100_000)
    with pytest.raises(fv.CheckpointError, match="nested"):
        fv.compress_activations(model, error=0.2, profile=path)
    path.write_text(text)
    with pytest.raises(fv.CheckpointError, match="another model"):
        fv.compress_activations(nn.Linear(3, 5), error=0.2, profile=path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(fv.CheckpointError, match="not a regular file"):
        fv.compress_activations(model, error=0.2, profile=path)


def test_a_profile_of_another_metric_is_refused(tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "saved.json"
    for measured, asked in (list(fv.Relative), list(fv.Relative)[::-1]):
        with fv.compress_activations(model, error=0.2, relative_to=measured) as store:
            _train(model, 3)
        store.save_profile(path)
        fv.compress_activations(model, bytes=10**9, relative_to=measured, profile=path)
        with pytest.raises(fv.CheckpointError, match=f"measured relative to '{measured.value}'.*'{asked.value}'"):
            fv.compress_activations(model, error=0.2, relative_to=asked, profile=path)


def test_a_peak_is_recorded_by_a_store_that_is_entered_for_each_step() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    store = fv.compress_activations(model, bytes=10_000)

    def train() -> None:
        for _ in range(8):
            with store:
                model(torch.randn(512, 64)).square().mean().backward()
                optimizer.step()  # functions between the steps, of which the second is the one to be recorded

    with pytest.raises(fv.BudgetError, match="the least possible is"):
        train()


def test_a_profile_holds_errors_beyond_all_numbers(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    x = torch.randn(512, 64)
    x[0, 0], x[0, 1] = 3e38, -3e38  # the square of their distance is infinite
    with fv.compress_activations(model, error=0.1) as store:
        for _ in range(4):
            (model(x) * 1e-30).sum().backward()
    store.save_profile(tmp_path / "profile.json")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    site = json.loads((tmp_path / "profile.json").read_text())["sites"]["model:saved.linear.0.0"]
    assert site["errors"] == [None, None, None, None, 0.0]
    fv.compress_activations(model, error=0.1, profile=tmp_path / "profile.json")
