"""Quantizing within a limit of memory: the same result, and a clear error where the limit cannot be kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import foveate as fv
from foveate.errors import BudgetError
from tiny import mlp, rows

_CHILD = """
import json, sys, gc
import torch
import foveate as fv
from foveate.bench.fresh_process.run import peak_memory, reset_peak_memory
from foveate.kernels.backends.table import ensure_loaded
from foveate.calibrate.passes import calibration
from torch import nn
import psutil

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 1280, bias=False), nn.Linear(1280, width, bias=False)
    def forward(self, x):
        return x + self.down(torch.sigmoid(self.up(x)))

width, layers = 32, 12
torch.manual_seed(0)
model = nn.Sequential(*(Block(width) for _ in range(layers)), nn.Linear(width, 32))
batches = [torch.randn(4096, width)]
ensure_loaded()
schedules, choose = [], calibration.make_schedule
def chosen(costs, kept, kept_replayed, forward, room, comfort=None):
    schedules.append(choose(costs, kept, kept_replayed, forward, room, comfort))
    schedules.append(choose(costs, kept, kept_replayed, forward, 290 << 20))
    return schedules[0]

calibration.make_schedule = chosen
gc.collect()
before = psutil.Process().memory_info().rss
reset_peak_memory()
extra = None if sys.argv[1] == "none" else int(sys.argv[1])
limit = None if extra is None else before + extra
profile = fv.quantize(model, batches, objective=fv.Logits(), progress=False, memory=limit)
total = {n: float(t.double().sum()) for n, t in profile.losses.items()}
taken = peak_memory() - before
found = {"peak": taken, "passes": len(schedules[0].parts), "losses": total, "notes": profile.notes}
found |= {"roomy_is_free": schedules[0] == schedules[1], "replay": schedules[0].replay}
print(json.dumps(found))
"""


def _child(extra: int | None) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, "none" if extra is None else str(extra)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_the_limit_is_kept_and_changes_nothing() -> None:
    free = _child(None)
    # where nothing is said, blocks run twice if that takes little time: what backward keeps alone would be more
    assert 200 << 20 < free["peak"] < 560 << 20
    assert free["passes"] == 1
    assert free["replay"]
    assert free["roomy_is_free"]  # a limit of 290 MiB would change nothing
    bounded = _child(200 << 20)
    assert bounded["peak"] <= 200 << 20
    assert bounded["passes"] > 1
    assert bounded["notes"] == free["notes"]
    for name, total in free["losses"].items():
        assert bounded["losses"][name] == pytest.approx(total, rel=1e-4)


def test_a_limit_that_cannot_be_kept() -> None:
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(BudgetError, match=r"memory \(=1.00 MiB\) is too little: the process takes"):
        fv.quantize(model, rows(), memory="1MiB", progress=False)
    assert all(map(torch.equal, before, model.parameters()))


def test_the_least_memory_that_is_said_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr("foveate.calibrate.passes.calibration.psutil.Process", lambda: process)
    with pytest.raises(BudgetError, match=r"quantizing this model [\d.]+ MiB more") as refused:
        fv.quantize(mlp(), rows(), objective=fv.Logits(), memory="1MiB", progress=False)
    said = re.search(r"this model ([\d.]+) MiB", str(refused.value))
    assert said is not None
    enough = f"{float(said[1]) + 0.01:.2f}MiB"
    assert fv.quantize(mlp(), rows(), objective=fv.Logits(), memory=enough, progress=False).losses
