"""A calibration that several processes share has the same result, whatever their number, and can be gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import foveate as fv
from foveate.calibrate.parallel import weight_work
from foveate.calibrate.processes.group import Processes
from foveate.calibrate.processes.owners import owners
from foveate.calibrate.processes.resuming import ResumeFiles
from foveate.calibrate.processes.shards import SHARDS, Shards
from foveate.calibrate.resuming import ResumeFile
from foveate.collect.collector import Collector
from foveate.collect.kinds import find_weights
from foveate.collect.sums import RANGES, add, clear
from foveate.errors import DataError
from foveate.nn.experts import taken_apart
from tiny import generator, mlp, rows

_CHILD = Path(__file__).with_name("shared_child.py")


def _start(folder: Path, rank: int, count: int, stop: int = 0) -> subprocess.Popen[str]:
    here = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(_CHILD), str(folder), str(rank), str(count), str(stop)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here},
    )  # fmt: skip


def _run(folder: Path, count: int, stop: int = 0) -> list[dict[str, Any]]:
    """What each of so many processes found; with `stop` they end early, and nothing is found."""
    children = [_start(folder, rank, count, stop) for rank in range(count)]
    said = [child.communicate()[1] for child in children]
    for child, text in zip(children, said, strict=True):
        assert child.returncode == (9 if stop else 0), text[-3000:]
    return [] if stop else [json.loads((folder / f"out-{count}-{rank}.json").read_text()) for rank in range(count)]


def test_any_number_of_processes_has_the_result_of_one(tmp_path: Path) -> None:
    (one,) = _run(tmp_path, 1)
    for found in _run(tmp_path, 3):
        assert found == one
    assert one["reads past"]["notes"][0].startswith("the weights of up stay float")  # one of nine batches showed it
    # the sums of a process alone are added in another order, and taken from other rows of convolutions
    (alone,) = (json.loads(path.read_text()) for path in _alone(tmp_path))
    for name, found in one.items():
        assert found["samples"] == alone[name]["samples"]
        assert found["losses"] == pytest.approx(alone[name]["losses"], rel=0.02, abs=1e-9), name
        assert found["measured"] == pytest.approx(alone[name]["measured"], rel=0.02), name


def _alone(folder: Path) -> list[Path]:
    child = _start(folder, 0, 0)
    assert child.communicate()[1] is not None
    assert child.returncode == 0
    return [folder / "out-0-0.json"]


def test_any_number_of_processes_goes_on_from_the_files_of_others(tmp_path: Path) -> None:
    (whole,) = _run(tmp_path, 1)
    (tmp_path / "resuming").touch()
    _run(tmp_path, 2, stop=3)
    files = sorted(path.name for path in tmp_path.glob("resume.*"))
    assert files == ["resume.6.0-of-2", "resume.6.1-of-2"]
    assert 0 < float(load_file(tmp_path / files[0])["batches"]) < 9
    (tmp_path / "more data").touch()
    assert "16 shards, which are 6 of the 18 given" in _fails(tmp_path, 1)[0]
    (tmp_path / "more data").unlink()
    (tmp_path / "resume.8.0-of-2").touch()  # of a round that did not end
    (found,) = _run(tmp_path, 1)
    assert found["llama"] == whole["llama"]
    assert not list(tmp_path.glob("resume.*"))


def test_a_process_whose_peer_has_ended_says_so_and_leaves_its_files(tmp_path: Path) -> None:
    (tmp_path / "resuming").touch()
    (tmp_path / "first stays").touch()
    left, ended = [_start(tmp_path, rank, 2, stop=3) for rank in range(2)]
    said = left.communicate()[1]
    ended.communicate()
    assert (left.returncode, ended.returncode) == (1, 9)
    assert "LostProcessError: another process that shares this calibration has ended or cannot be reached: " in said
    assert sorted(path.name for path in tmp_path.glob("resume.*")) == ["resume.6.0-of-2", "resume.6.1-of-2"]


def test_processes_with_data_of_their_own_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other data").touch()
    for said in _fails(tmp_path, 2):
        assert "DataError: the processes that share a calibration have different batches" in said


def test_processes_with_options_of_their_own_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other options").touch()
    for said in _fails(tmp_path, 2):
        assert "DataError: the processes that share a calibration have different options: group" in said
    with pytest.raises(DataError, match=r"processes \(=2\) is not a process group"):
        fv.quantize(mlp(), rows(), processes=2, progress=False)  # type: ignore[arg-type]


def _fails(folder: Path, count: int) -> list[str]:
    """What each of so many processes says when it fails."""
    children = [_start(folder, rank, count) for rank in range(count)]
    said = [child.communicate()[1] for child in children]
    assert all(child.returncode == 1 for child in children)
    return said


def test_files_of_another_model_or_other_data_are_refused(tmp_path: Path) -> None:
    processes, model = Processes(), mlp()
    sample = torch.zeros(3, dtype=torch.float64)
    file = ResumeFile(path=tmp_path / "resume", objective=fv.Logits(), sample=sample)
    found = find_weights(model)
    owner = owners(model, found, 1)
    assert ResumeFiles(file, processes, owner).shards == 0
    collector = Collector(found, fv.Logits(), shards=SHARDS)
    ResumeFiles(file, processes, owner).write(collector.state(), 4)
    files = ResumeFiles(file, processes, owner)
    assert files.shards == 4
    assert files.keys == set(collector.state())
    with pytest.raises(DataError, match="another model or objective, or other data"):
        ResumeFiles(ResumeFile(path=file.path, objective=fv.Logits(), sample=sample + 1), processes, owner)
    other = mlp((70, 12, 10))
    collector = Collector(find_weights(other), fv.Logits())
    with pytest.raises(DataError, match="another model or objective: delete them"):
        Shards(rows(), collector, processes, owners(other, find_weights(other), 1), files)
    files.delete()
    assert not list(tmp_path.iterdir())


@given(st.integers(0, 70), st.integers(1, 20))
def test_every_batch_is_in_one_shard_of_one_process(batches: int, count: int) -> None:
    model = mlp((4, 3))

    class One(Processes):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.count = rank, count

    places = []
    for rank in range(count):
        collector = Collector(find_weights(model), fv.Logits())
        shards = Shards(list(range(batches)), collector, One(rank), {"0": 0}, None)
        assert shards.count == shards.left == len(shards.places)
        places += shards.places
    assert sorted(places) == list(range(batches))


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=30), st.integers(1, 9))
def test_weights_are_shared_out_evenly(shapes: list[tuple[int, int]], count: int) -> None:
    model = nn.Sequential(*(nn.Linear(k, n, bias=False) for n, k in shapes))
    found = find_weights(model)
    owner = owners(model, found, count)
    work = [0] * count
    for entry in found:
        work[owner[entry.names[0]]] += weight_work(entry)
    assert max(work) - min(work) <= max(map(weight_work, found))


def test_all_experts_of_a_layer_go_together() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=50, num_local_experts=4))
    with taken_apart(model):
        owner = owners(model, find_weights(model), 3)
    for layer in range(2):
        for part in ("gate_up_proj", "down_proj"):
            assert len({owner[f"model.layers.{layer}.mlp.experts.{i}.{part}"] for i in range(4)}) == 1
    assert set(owner.values()) == {0, 1, 2}


@pytest.mark.parametrize("key", ["0|energy_K", "0|input range", "0|input batch_moments", "0|output_range", "samples"])
def test_statistics_add_up(key: str) -> None:
    shape = (2, 2) if "moments" in key else (2,)
    parts = torch.randn(5, *shape, generator=generator(0))
    total = torch.empty(shape)
    clear(key, total)
    for part in parts:
        add(key, total, part)
    if key.rpartition("|")[2] in RANGES:
        assert torch.equal(total, torch.stack([parts[:, 0].amin(0), parts[:, 1].amax(0)]))
    else:
        assert torch.allclose(total, parts.sum(0))


def test_one_process_alone_talks_to_itself() -> None:
    alone, x = Processes(), torch.arange(3.0)
    assert alone.told({"a": 1}) == [{"a": 1}]
    assert torch.equal(alone.total(x), x)
    assert alone.sent({"x": x}, 0)["x"] is x
    assert (alone.here, alone.count, alone.rank, alone.shared) == (1, 1, 0, False)
