"""A resume file of another model or other data, or a damaged one, is refused."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

import foveate as fv
from foveate.calibrate.one_weight import QuantizedWeight, round_and_score
from foveate.calibrate.resuming import ResumeFile, _digest, sample_of
from foveate.collect.collector import Collector
from foveate.collect.kinds import QuantizableWeight, find_weights
from foveate.errors import DataError
from foveate.files import checksum
from tiny import mlp, rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model, batches = mlp(), rows()
    collector = Collector(find_weights(model), fv.Logits())
    collector.add(model, batches[0])
    sample = sample_of(model, batches[0])
    ResumeFile(path=tmp_path / "resume", objective=fv.Logits(), sample=sample).write(collector.state())
    assert os.listdir(tmp_path) == ["resume"]
    return tmp_path / "resume"


def _read(file: Path, seed: int = 0, data: int = 1, objective: fv.Objective | None = None) -> dict[str, Tensor]:
    sample = sample_of(mlp(seed=seed), rows(seed=data)[0])
    return ResumeFile(path=file, objective=objective or fv.Logits(), sample=sample).read()


def test_it_is_of_this_model_data_and_objective(file: Path) -> None:
    assert _read(file)
    for change in ({"seed": 1}, {"data": 2}, {"objective": fv.Embedding()}):
        with pytest.raises(DataError, match="another model or objective"):
            _read(file, **change)  # type: ignore[arg-type]


def test_a_change_anywhere_is_noticed(file: Path) -> None:
    choice, content = random.Random(0), file.read_bytes()
    for _ in range(60):
        altered = bytearray(content)
        altered[choice.randrange(len(altered))] ^= 1 << choice.randrange(8)
        file.write_bytes(altered)
        with pytest.raises(DataError, match="delete it to start afresh"):
            _read(file)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("0|covariance_KK", lambda t: -t),
        ("0|energy_K", lambda t: -t),
        ("0|rows", lambda t: -t),
        ("0|energy_K", lambda t: t / 0),
        ("0|input moments", lambda t: t * float("nan")),
        ("samples", lambda t: t * float("inf")),
        ("samples", lambda t: t.expand(3).clone()),
    ],
)
def test_what_makes_no_sense_is_refused(file: Path, key: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load(file.read_bytes())
    tensors[key] = change(tensors[key])
    about = {"foveate_resume": "3", "objective": "Logits"}
    about["sha256"] = _digest(about, {name: checksum(t) for name, t in tensors.items()})
    save_file(tensors, file, about)
    with pytest.raises(DataError, match="makes no sense"):
        _read(file)


def test_another_version_and_what_is_no_file(file: Path) -> None:
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(DataError, match="another version"):
        _read(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="not a regular file"):
        _read(file)


def test_an_interruption_while_rounding_leaves_the_model_and_all_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass is not made again: every batch is in the file, however many there were."""
    file, model, batches, done = tmp_path / "resume", mlp(), rows(70, 70, 7), []
    before, expected = model(batches[0]), fv.quantize(mlp(), batches, progress=False)

    def interrupted(entry: QuantizableWeight, *others: Any) -> QuantizedWeight:
        done.append(entry.names[0])
        if len(done) == 2:
            raise KeyboardInterrupt
        return round_and_score(entry, *others)

    with monkeypatch.context() as patched:
        patched.setattr("foveate.calibrate.quantize.round_and_score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fv.quantize(model, batches, resume=file, progress=False)
    assert torch.equal(model(batches[0]), before)
    assert float(load(file.read_bytes())["batches"]) == 7
    backward = []
    monkeypatch.setattr(Collector, "add", lambda *args: backward.append(args))
    profile = fv.quantize(model, batches, resume=file, progress=False)
    assert not backward
    assert all(torch.equal(t, expected.losses[n]) for n, t in profile.losses.items())
    assert not file.exists()
