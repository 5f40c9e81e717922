"""`torchrun -m foveate quantize`: several processes write one folder, and the first of them speaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny import llama


def _torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*command, "-m", "foveate", "quantize", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_two_processes_write_what_one_does(model: Path, tmp_path: Path) -> None:
    import numpy

    data = tmp_path / "tokens.npy"
    numpy.save(data, torch.randint(3, 50, (40 * 16,)).numpy())
    options = ["--tokens", str(data), "--length", "16", "--batch", "2", "--bits", "5"]
    for count in (1, 2):
        done = _torchrun(count, str(model), str(tmp_path / f"out{count}"), *options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("weights on planes") == 1
        assert done.stderr.count("calibrating on") == 1
        assert done.stderr.count(f"calibration is shared by {count} process") == 1
    names = [sorted(path.name for path in (tmp_path / f"out{count}").iterdir()) for count in (1, 2)]
    assert names[0] == names[1]  # the names of files of planes are made from their content


def test_an_error_is_said_once_by_each_and_ends_all(model: Path, tmp_path: Path) -> None:
    done = _torchrun(2, str(model), str(tmp_path / "out"))
    assert done.returncode
    assert "error: there are no data" in done.stderr
    assert not (tmp_path / "out").exists()
