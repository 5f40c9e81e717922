"""Damaged files, threads, other processes, short memory: the right result or a clear error, never a wrong number."""

from __future__ import annotations

import copy
import os
import pickle
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
from resident import Saved, X, expected, settled, skeleton
from torch import nn

import foveate as fv
from folders import copy_of, rewrite
from foveate.errors import CheckpointError, FoveateError
from foveate.memory.mover import FIRST_RETRY_S
from foveate.nn.residency.attach import resident_registry
from foveate.nn.residency.following import look


def _plane_file(folder: Path, plane: int) -> Path:
    return folder / fv.read_head(folder).files[f"plane{plane}"]


def test_a_file_that_is_damaged_while_open_costs_a_level_and_no_more(small_runs: Saved, tmp_path: Path) -> None:
    source, model, profile = small_runs
    folder = copy_of(source, tmp_path / "model")
    loaded = fv.load(folder, memory=profile.uniform(4).bytes_resident, model=skeleton())
    file = _plane_file(folder, 4)
    content = file.read_bytes()
    os.truncate(file, len(content) - 600)
    fv.resize(loaded, memory="1GiB")
    deadline = time.monotonic() + 30
    while fv.memory_report(loaded).io_errors.get(str(file), 0) < 3 and time.monotonic() < deadline:
        time.sleep(FIRST_RETRY_S / 10)
    with pytest.warns(RuntimeWarning, match=r"plane4-.* is cut off: it ends before plane 4 of .*; the model goes on"):
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


def test_a_head_with_runs_that_do_not_fit_is_refused(small_runs: Saved, tmp_path: Path) -> None:
    source, _, _ = small_runs

    def changed(**table: Any) -> Any:
        def change(data: Any) -> Any:
            data["files"]["plane0"]["runs"]["0:weight"].update(table)
            return data

        return change

    for number, (table, text) in enumerate(
        {
            "do not ascend from 0": {"strips": [0, 3, 2, 5, 6]},
            "checksums": {"xxh3": ["0" * 32]},
            "the head lists strip 99": {"strips": [0, 2, 4, 6, 99]},
            "not a finite number": {"importance": ["x"] * 5},
        }.items()
    ):
        folder = copy_of(source, tmp_path / str(number))
        count = len(fv.read_head(folder).runs["plane0"]["0:weight"].strips)
        cut = {key: value[:count] if key != "xxh3" else value for key, value in text.items()}
        if "strips" in cut:
            cut["strips"] = [*range(count - 1), 99] if "99" in table else [0, *range(count, 1, -1)]
        rewrite(folder, changed(**cut))
        with pytest.raises(CheckpointError, match=table):
            fv.load(folder, memory="1GiB", model=skeleton())
    folder = copy_of(source, tmp_path / "older")
    rewrite(folder, lambda data: {**data, "features": ["runs", "later"]})
    with pytest.raises(CheckpointError, match="needs features that this foveate does not have: later"):
        fv.load(folder, memory="1GiB", model=skeleton())


def test_runs_of_earlier_states_are_refused_in_a_sentence(small_runs: Saved, tmp_path: Path) -> None:
    folder = copy_of(small_runs[0], tmp_path / "earlier")

    def earlier(data: Any) -> Any:
        for table in data["files"]["plane0"]["runs"].values():
            table["sha256"] = [2 * sum for sum in table.pop("xxh3")]
        return data

    rewrite(folder, earlier)
    with pytest.raises(CheckpointError, match="an earlier state of foveate wrote it, save the model again"):
        fv.load(folder, model=skeleton())


def test_a_folder_without_runs_is_read_plane_by_plane(small_runs: Saved, tmp_path: Path) -> None:
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


def test_what_such_a_model_does_not_do(small_runs: Saved) -> None:
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


def test_a_plain_model_again(small_runs: Saved) -> None:
    folder, model, profile = small_runs
    loaded = fv.load(folder, memory=profile.uniform(4).bytes_resident, model=skeleton())
    y = expected(model, loaded)
    fv.dequantize(loaded)
    assert isinstance(loaded[0], nn.Linear)  # type: ignore[index]
    assert torch.allclose(loaded(X), y, atol=0.05)
    loaded.state_dict()


def test_calls_in_several_threads_while_memory_changes(small_runs: Saved) -> None:
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


def test_memory_that_follows_what_is_free(small_runs: Saved, capsys: Any) -> None:
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


def test_two_processes_on_one_checkpoint_and_one_is_killed(small_runs: Saved, tmp_path: Path) -> None:
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


def test_a_compiled_model(small_runs: Saved) -> None:
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
