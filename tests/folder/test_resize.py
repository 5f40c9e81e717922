"""A model that may take only so much memory: it computes what the map in force says it does, and keeps to its limit."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foveate as fv
from folders import copy_of, mixed, rewrite
from foveate.checkpoint import runs as checkpoint_runs
from foveate.errors import BudgetError, CheckpointError, FoveateError, PlaneNotResidentError
from foveate.memory.mover import FIRST_RETRY_S
from foveate.nn.residency.following import look
from foveate.nn.residency.registry import resident_registry
from tiny import mlp, rows

SIZES = (96, 160, 128, 40)
X = rows(8, SIZES[0], 1)[0]


def skeleton() -> nn.Module:
    with torch.device("meta"):
        return mlp(SIZES)


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, fv.Profile]:
    """A folder whose planes are cut into runs of at least 512 bytes, with its model and profile."""
    model = mlp(SIZES)
    profile = fv.quantize(model, rows(64, SIZES[0]), objective=fv.Logits(), progress=False)
    folder = tmp_path_factory.mktemp("runs") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_runs, "LEAST_RUN", 512)
        fv.save(model, folder)
    return folder, model, profile


def expected(model: nn.Module, loaded: nn.Module) -> torch.Tensor:
    """What the model whose planes are all in memory gives at the map that is in force in the other one."""
    fv.apply(model, fv.current_map(loaded))
    with torch.no_grad():
        y: torch.Tensor = model(X)
    return y


def settled(loaded: nn.Module) -> nn.Module:
    """The model after everything that is on its way has arrived, and a call has taken it."""
    deadline = time.monotonic() + 30
    while fv.memory_report(loaded).waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with torch.no_grad():
        loaded(X)
    return loaded


def test_the_head_lists_runs_and_their_checksums(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder, model, profile = small_runs
    head = fv.read_head(folder)
    table = head.runs["plane0"]["0:weight"]
    assert len(table.strips) == len(table.sha256) == len(table.importance) > 2
    # the losses of all runs of plane 0 are what the weight loses at 0 bits and not at 2
    losses = profile.scaled_losses("0:weight")
    assert losses is not None
    assert sum(table.importance) == pytest.approx(float((losses[:, 0] - losses[:, 1]).clamp_min(0).sum()))
    assert torch.equal(expected(model, fv.load(folder, model=skeleton())), model(X))


def test_every_limit_gives_the_map_in_force(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
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


def test_memory_goes_and_comes_back_while_the_model_runs(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
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


def test_a_map_that_is_applied_is_fetched_for(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
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


def test_a_standing_floor_is_never_undercut(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
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


def test_strict_waits_for_what_the_map_reads(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
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


def test_strict_streams_a_map_that_does_not_fit(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
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
    with pytest.raises(BudgetError, match="the planes of 2:weight need .* are left beside what always stays"):
        loaded(X)
    fv.apply(loaded, profile.uniform(2))
    fv.resize(loaded, memory="1GiB")
    fv.apply(loaded, eight)
    fv.apply(model, eight)
    assert torch.equal(loaded(X), model(X))


def test_saving_copies_what_is_stored(small_runs: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
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


def _plane_file(folder: Path, plane: int) -> Path:
    return folder / fv.read_head(folder).files[f"plane{plane}"]


def test_a_file_that_is_damaged_while_open_costs_a_level_and_no_more(
    small_runs: tuple[Path, nn.Module, fv.Profile], tmp_path: Path
) -> None:
    source, model, profile = small_runs
    folder = copy_of(source, tmp_path / "model")
    loaded = fv.load(folder, memory=profile.uniform(4).bytes_resident, model=skeleton())
    file = _plane_file(folder, 4)
    content = file.read_bytes()
    os.truncate(file, len(content) - 600)
    fv.resize(loaded, memory="1GiB")
    with pytest.warns(RuntimeWarning, match=r"plane4-.* is cut off: it ends before plane 4 of .*; the model goes on"):
        deadline = time.monotonic() + 30
        while fv.memory_report(loaded).io_errors.get(str(file), 0) < 3 and time.monotonic() < deadline:
            time.sleep(FIRST_RETRY_S / 10)
        loaded(X)
    loaded(X)
    assert fv.memory_report(loaded).io_errors[str(file)] >= 3
    assert torch.equal(loaded(X), expected(model, loaded))
    levels = set(fv.current_map(loaded).levels["4:weight"])  # type: ignore[arg-type]
    assert levels == {6} or 6 in levels
    # and once it is whole again, it is read at last
    with open(file, "r+b") as opened:
        opened.write(content)
    settled(loaded)
    fv.apply(model, profile.uniform(8))
    assert torch.equal(loaded(X), model(X))
    # before anything is in memory, a damaged folder is not loaded
    with open(file, "r+b") as opened:
        opened.seek(len(content) - 700)
        opened.write(bytes([content[-700] ^ 4]))
    with pytest.raises(CheckpointError, match="is damaged: the checksum of plane 4 of"):
        fv.load(folder, memory="1GiB", model=skeleton())
    os.truncate(file, 100)
    with pytest.raises(CheckpointError, match="is damaged"):
        fv.load(folder, memory="1GiB", model=skeleton())


def test_a_head_with_runs_that_do_not_fit_is_refused(
    small_runs: tuple[Path, nn.Module, fv.Profile], tmp_path: Path
) -> None:
    source, _, _ = small_runs

    def changed(**table: Any) -> Any:
        def change(data: Any) -> Any:
            data["files"]["plane0"]["runs"]["0:weight"].update(table)
            return data

        return change

    for number, (table, text) in enumerate(
        {
            "do not ascend from 0": {"strips": [0, 3, 2, 5, 6]},
            "checksums": {"sha256": ["0"]},
            "the head lists strip 99": {"strips": [0, 2, 4, 6, 99]},
            "not a finite number": {"importance": ["x"] * 5},
        }.items()
    ):
        folder = copy_of(source, tmp_path / str(number))
        count = len(fv.read_head(folder).runs["plane0"]["0:weight"].strips)
        cut = {key: value[:count] if key != "sha256" else value for key, value in text.items()}
        if "strips" in cut:
            cut["strips"] = [*range(count - 1), 99] if "99" in table else [0, *range(count, 1, -1)]
        rewrite(folder, changed(**cut))
        with pytest.raises(CheckpointError, match=table):
            fv.load(folder, memory="1GiB", model=skeleton())
    folder = copy_of(source, tmp_path / "older")
    rewrite(folder, lambda data: {**data, "features": ["runs", "later"]})
    with pytest.raises(CheckpointError, match="needs features that this foveate does not have: later"):
        fv.load(folder, memory="1GiB", model=skeleton())


def test_a_folder_without_runs_is_read_plane_by_plane(
    small_runs: tuple[Path, nn.Module, fv.Profile], tmp_path: Path
) -> None:
    source, model, profile = small_runs
    folder = copy_of(source, tmp_path / "older")

    def without(data: Any) -> Any:
        for entry in data["files"].values():
            entry.pop("runs", None)
        return {**data, "features": []}

    rewrite(folder, without)
    loaded = fv.load(folder, memory=profile.uniform(4).bytes_resident, model=skeleton())
    assert len(resident_registry(loaded).residency.held.runs) == 15
    assert torch.equal(loaded(X), expected(model, loaded))


def test_what_such_a_model_does_not_do(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder, _, _ = small_runs
    loaded = fv.load(folder, memory="1GiB", model=skeleton())
    for action in (loaded.state_dict, lambda: loaded.load_state_dict({}), lambda: copy.deepcopy(loaded)):
        with pytest.raises(FoveateError, match="partly on disk"):
            action()
    with pytest.raises(FoveateError, match="partly on disk"):
        pickle.dumps(loaded)
    whole = fv.load(folder, model=skeleton())
    for call in (lambda: fv.resize(whole, memory="1GiB"), lambda: fv.memory_report(whole)):
        with pytest.raises(FoveateError, match="all planes of this model are in memory"):
            call()

    def within(module: nn.Module, args: Any) -> None:
        fv.resize(loaded, memory="1GiB")

    hook = loaded[0].register_forward_pre_hook(within)  # type: ignore[index]
    with pytest.raises(FoveateError, match="within a call of the model"):
        loaded(X)
    hook.remove()
    assert torch.isfinite(loaded(X)).all()
    fv.resize(loaded, memory="1GiB")


def test_a_plain_model_again(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory=profile.uniform(4).bytes_resident, model=skeleton())
    y = expected(model, loaded)
    fv.dequantize(loaded)
    assert isinstance(loaded[0], nn.Linear)  # type: ignore[index]
    assert torch.allclose(loaded(X), y, atol=0.05)
    loaded.state_dict()


def test_calls_in_several_threads_while_memory_changes(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
    """Every call is of one map from beginning to end: it gives what one of the maps in force meanwhile gives."""
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory="1GiB", model=skeleton())
    small = profile.uniform(2).bytes_resident
    seen: list[torch.Tensor] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with torch.no_grad():
                seen.append(loaded(X))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        fv.resize(loaded, memory=small)
        time.sleep(0.01)
        fv.resize(loaded, memory="1GiB", floor=2)
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    fv.apply(model, profile.uniform(8))
    top = model(X)
    low = fv.load(folder, memory=small, model=skeleton())(X)
    assert any(torch.equal(y, low) for y in seen)
    assert any(torch.equal(y, top) for y in seen)
    assert all(torch.isfinite(y).all() for y in seen)


def test_memory_that_follows_what_is_free(small_runs: tuple[Path, nn.Module, fv.Profile], capsys: Any) -> None:
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory="auto", model=skeleton())
    registry = resident_registry(loaded)
    assert fv.current_map(loaded) == profile.uniform(8)
    assert registry.auto is not None
    three = profile.uniform(3).bytes_resident
    taken = fv.memory_report(loaded).taken
    # another process takes memory until only so much is left to us
    look(registry, registry.auto.margin + three - taken, 1e9)
    assert fv.memory_report(loaded).taken <= three
    assert torch.equal(loaded(X), expected(model, loaded))
    look(registry, 0, 2e9)  # none at all: it stops at what it cannot do without, and says so
    assert fv.memory_report(loaded).taken == profile.uniform(2).bytes_resident
    assert "memory is short" in capsys.readouterr().err
    look(registry, 1 << 40, 3e9)
    settled(loaded)
    fv.apply(model, profile.uniform(8))
    assert torch.equal(loaded(X), model(X))
    fv.resize(loaded, memory=three)
    assert registry.auto is None


_SERVE_FOR_EVER = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import foveate as fv
    from tiny import mlp, rows
    model = fv.load(sys.argv[2], memory=int(sys.argv[3]), model=mlp((96, 160, 128, 40)))
    x = rows(8, 96, 1)[0]
    print("ready", flush=True)
    while True:
        fv.resize(model, memory=int(sys.argv[3]))
        model(x)
        fv.resize(model, memory="1GiB")
        model(x)
"""


def test_two_processes_on_one_checkpoint_and_one_is_killed(
    small_runs: tuple[Path, nn.Module, fv.Profile], tmp_path: Path
) -> None:
    source, model, profile = small_runs
    folder = copy_of(source, tmp_path / "model")
    small = profile.uniform(2).bytes_resident
    code = textwrap.dedent(_SERVE_FOR_EVER)
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(folder), str(small)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    loaded = fv.load(folder, memory="1GiB", model=skeleton())
    fv.resize(loaded, memory=small)
    fv.save(loaded, folder)  # which replaces what the other process reads
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    again = fv.load(folder, memory="1GiB", model=skeleton())
    fv.apply(again, profile.uniform(8))
    fv.apply(model, profile.uniform(8))
    assert torch.equal(again(X), model(X))
    assert torch.equal(loaded(X), expected(model, loaded))


def test_a_compiled_model(small_runs: tuple[Path, nn.Module, fv.Profile]) -> None:
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory="1GiB", model=skeleton())
    compiled = torch.compile(loaded, backend="eager")
    with torch.no_grad():
        for level in (8, 3, 6):
            fv.resize(loaded, memory=profile.uniform(level).bytes_resident)
            compiled(X)
            settled(loaded)
            assert torch.equal(compiled(X), expected(model, loaded))
    assert fv.memory_report(loaded).passes >= 6
