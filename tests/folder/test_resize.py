"""A model that may take only so much memory: it computes what the map in force says it does, and keeps to its limit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from resident import Saved, X, expected, settled, skeleton
from torch import nn

import foveate as fv
from folders import copy_of, mixed
from foveate.errors import BudgetError, CheckpointError, LevelError, PlaneNotResidentError
from foveate.nn.residency.attach import resident_registry


def test_the_head_lists_runs_and_their_checksums(small_runs: Saved) -> None:
    folder, model, profile = small_runs
    head = fv.read_head(folder)
    table = head.runs["plane0"]["0:weight"]
    assert len(table.strips) == len(table.xxh3) == len(table.importance) > 2
    # the losses of all runs of plane 0 are what the weight loses at 0 bits and not at 2
    losses = profile.scaled_losses("0:weight")
    assert losses is not None
    assert sum(table.importance) == pytest.approx(float((losses[:, 0] - losses[:, 1]).clamp_min(0).sum()))
    assert torch.equal(expected(model, fv.load(folder, model=skeleton())), model(X))


def test_every_limit_gives_the_map_in_force(small_runs: Saved) -> None:
    folder, model, profile = small_runs
    least, most = profile.uniform(2).bytes_resident, profile.uniform(8).bytes_resident
    losses = []
    for limit in (*range(least, most, (most - least) // 9), most):
        loaded = fv.load(folder, memory=limit, model=skeleton())
        plan, report = fv.current_map(loaded), fv.memory_report(loaded)
        assert torch.equal(loaded(X), expected(model, loaded))
        assert report.taken == plan.bytes_resident <= limit == report.limit
        assert not report.fallback_count
        losses.append(profile.predict(plan))
    assert losses == sorted(losses, reverse=True)
    assert fv.current_map(loaded) == profile.uniform(8)
    # cut at runs, a limit is used up but for less than a run, and the map is nearly that of a limit on tiles
    plan = fv.allocate(profile, fv.Budget(bytes=least + (most - least) // 2), fv.Constraints(levels=(2, 3, 4, 6, 8)))
    loaded = fv.load(folder, memory=plan.bytes_resident, model=skeleton())
    assert profile.predict(fv.current_map(loaded)) < 2 * profile.predict(plan)


def test_memory_goes_and_comes_back_while_the_model_runs(small_runs: Saved) -> None:
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory="1GiB", model=skeleton())
    registry = resident_registry(loaded)
    for level in (3, 8, 2, 6, 4):
        limit = profile.uniform(level).bytes_resident
        fv.resize(loaded, memory=limit)
        assert fv.memory_report(loaded).taken <= limit
        assert torch.equal(loaded(X), expected(model, loaded))  # whatever has arrived by now
        settled(loaded)
        assert torch.equal(loaded(X), expected(model, loaded))
        report = fv.memory_report(loaded)
        assert report.taken <= limit
        in_pages = sum(registry.residency.held.layout.slots[n].pages for n in registry.residency.resident())
        assert registry.residency.held.reservation.resident() == in_pages
    assert report.fallback_count  # the calls that came before the planes did
    assert "were read below the map in force" in str(report)


def test_a_map_that_is_applied_is_fetched_for(small_runs: Saved) -> None:
    folder, model, profile = small_runs
    name = "2:weight"
    plan = profile.uniform(2).with_level(name, 8)
    loaded = fv.load(folder, memory=plan.bytes_resident, model=skeleton())
    fv.apply(loaded, plan)
    before = fv.current_map(loaded)
    assert before != plan  # not all of it is there
    assert torch.equal(loaded(X), expected(model, loaded))
    for _ in range(3000):
        if fv.current_map(loaded) == plan:
            break
        loaded(X)
    assert fv.current_map(loaded) == plan
    assert torch.equal(loaded(X), expected(model, loaded))
    report = fv.memory_report(loaded)
    assert set(report.fallback_count) == {name}
    assert report.taken <= report.limit
    # of a folder that lacks planes, it is an error as ever
    with pytest.raises(PlaneNotResidentError, match="the folder stores some of its tiles up to 4 bits only"):
        fv.apply(_four_bits(folder, model, profile), profile.uniform(6))


def _four_bits(folder: Path, model: nn.Module, profile: fv.Profile) -> nn.Module:
    four = folder.parent / "four"
    fv.save(model, four, keep=profile.uniform(4))
    return fv.load(four, memory="1GiB", model=skeleton())


def test_a_standing_floor_is_never_undercut(small_runs: Saved) -> None:
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory="1GiB", model=skeleton())
    three = profile.uniform(3).bytes_resident
    fv.resize(loaded, memory="1GiB", floor=3)
    with pytest.raises(BudgetError, match="is less than the standing floor needs"):
        fv.resize(loaded, memory=three - 1)
    assert fv.current_map(loaded) == profile.uniform(8)
    fv.resize(loaded, memory=three)
    assert fv.current_map(loaded).levels["0:weight"] == 3
    with pytest.raises(BudgetError, match="is less than the standing floor needs"):
        fv.resize(loaded, memory=three, floor=profile.uniform(4))
    fv.resize(loaded, memory=profile.uniform(2).bytes_resident, floor=2)
    with pytest.raises(BudgetError, match="is less than the least possible needs"):
        fv.resize(loaded, memory=1000)
    with pytest.raises(BudgetError, match="is not a number of bytes"):
        fv.resize(loaded, memory="much")
    assert torch.equal(loaded(X), expected(model, loaded))


def test_strict_waits_for_what_the_map_reads(small_runs: Saved) -> None:
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory="1GiB", strict=True, model=skeleton())
    fv.resize(loaded, memory=profile.uniform(2).bytes_resident)
    fv.resize(loaded, memory="1GiB")
    y = loaded(X)  # nothing was fetched yet when this began
    fv.apply(model, profile.uniform(8))
    assert torch.equal(y, model(X))
    report = fv.memory_report(loaded)
    assert report.wait_s > 0
    assert not report.fallback_count
    with pytest.raises(CheckpointError, match="give memory too"):
        fv.load(folder, strict=True, model=skeleton())


def test_strict_exchanges_what_it_must_at_once(small_runs: Saved) -> None:
    """However much leaves: an allowance against thrashing is not for calls that wait."""
    folder, model, profile = small_runs
    first, second = (profile.uniform(2).with_level(name, 8) for name in ("2:weight", "0:weight"))
    loaded = fv.load(folder, memory=max(p.bytes_resident for p in (first, second)), strict=True, model=skeleton())
    for plan in (first, second, first):
        fv.apply(loaded, plan)
        fv.apply(model, plan)
        assert torch.equal(loaded(X), model(X))
        assert fv.current_map(loaded) == plan
    assert not fv.memory_report(loaded).fallback_count


def test_strict_streams_a_map_that_does_not_fit(small_runs: Saved) -> None:
    folder, model, profile = small_runs
    eight, three = profile.uniform(8), profile.uniform(3).bytes_resident
    loaded = fv.load(folder, memory="1GiB", strict=True, model=skeleton())
    registry = resident_registry(loaded)
    largest = profile.uniform(2).with_level("2:weight", 8).bytes_resident
    fv.resize(loaded, memory=largest)
    fv.apply(loaded, eight)
    fv.apply(model, eight)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(loaded(X), model(X))
            assert fv.memory_report(loaded).taken <= largest
    assert fv.current_map(loaded) == eight
    report = fv.memory_report(loaded)
    assert not report.fallback_count
    assert report.fetched > 2 * eight.bytes_resident  # every call read what did not stay
    slots = sum(slot.pages for slot in registry.residency.held.layout.slots)
    assert registry.residency.held.reservation.resident() < slots
    # a map that fits ends it, and one layer that does not fit by itself is refused
    fv.apply(loaded, profile.uniform(2))
    assert torch.equal(loaded(X), expected(model, loaded))
    fv.resize(loaded, memory=three)
    fv.apply(loaded, eight)
    with pytest.raises(BudgetError, match=r"the planes of 2:weight need .* are left beside what always stays"):
        loaded(X)
    fv.apply(loaded, profile.uniform(2))
    fv.resize(loaded, memory="1GiB")
    fv.apply(loaded, eight)
    fv.apply(model, eight)
    assert torch.equal(loaded(X), model(X))


def test_saving_copies_what_is_stored(small_runs: Saved, tmp_path: Path) -> None:
    source, model, profile = small_runs
    folder = copy_of(source, tmp_path / "model")
    loaded = fv.load(folder, memory=profile.uniform(3).bytes_resident, model=skeleton())
    y = loaded(X)
    fv.save(loaded, tmp_path / "other")
    again = fv.load(tmp_path / "other", model=skeleton())
    fv.apply(again, profile.uniform(8))
    fv.apply(model, profile.uniform(8))
    assert torch.equal(again(X), model(X))
    # with fewer planes, tile by tile
    plan = mixed(profile, top=6)
    fv.save(loaded, tmp_path / "fewer", keep=plan)
    fv.apply(model, plan)
    assert torch.equal(fv.load(tmp_path / "fewer", model=skeleton())(X), model(X))
    # into the folder that it came from: the files that it has open are gone from there, and still serve
    fv.save(loaded, folder, keep=profile.uniform(2))
    assert torch.equal(loaded(X), y)
    fv.resize(loaded, memory="1GiB")
    settled(loaded)
    fv.apply(model, profile.uniform(8))
    assert torch.equal(loaded(X), model(X))
    shutil.rmtree(folder)
    fv.resize(loaded, memory=profile.uniform(2).bytes_resident)
    fv.resize(loaded, memory="1GiB")
    settled(loaded)
    assert torch.equal(loaded(X), model(X))


def test_saving_keeps_the_default_map_that_only_the_limit_lowered(small_runs: Saved, tmp_path: Path) -> None:
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory=profile.uniform(3).bytes_resident, model=skeleton())
    assert fv.current_map(loaded).bits < fv.read_head(folder).plan.bits
    fv.save(loaded, tmp_path / "same")
    assert fv.read_head(tmp_path / "same").plan.levels == fv.read_head(folder).plan.levels
    assert torch.equal(fv.load(tmp_path / "same", model=skeleton())(X), model(X))
    fv.apply(loaded, profile.uniform(4))  # somebody decided: that is what is saved
    fv.save(loaded, tmp_path / "other")
    assert fv.read_head(tmp_path / "other").plan.levels == profile.uniform(4).levels


@pytest.mark.parametrize("floor", [-3, 1, 5, 9, True, "4", 2.5])
def test_floors_are_maps_or_levels(small_runs: Saved, floor: object) -> None:
    folder, _, _ = small_runs
    loaded = fv.load(folder, memory="1GiB", model=skeleton())
    with pytest.raises(LevelError, match="is neither a map nor one of the levels"):
        fv.resize(loaded, memory="1GiB", floor=floor)  # type: ignore[arg-type]
