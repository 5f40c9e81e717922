"""A limit of memory around a model whose planes come and go: they leave with a fall, and come back with a rise."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import foveate as fv
from foveate.checkpoint import runs as checkpoint_runs
from foveate.kernels.backends.table import ensure_loaded
from foveate.runtime.options import ManagerOptions
from tiny import mlp, rows

SIZES = (256, 256, 256, 64)


@pytest.mark.skipif(ensure_loaded().isa is None, reason="planes on disk need compiled kernels")
def test_planes_leave_with_a_fall_and_come_back_with_a_rise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_runs, "LEAST_RUN", 1024)
    original = mlp(SIZES)
    profile = fv.quantize(original, rows(32, 256), objective=fv.Logits(), progress=False)
    fv.save(original, tmp_path / "out")
    with torch.device("meta"):
        skeleton = mlp(SIZES)
    model = fv.load(tmp_path / "out", memory="1MiB", model=skeleton)
    fv.apply(model, fv.frontier(profile, 8))
    whole, now, others = fv.memory_report(model), [0.0], [0]
    x = rows(4, 256)[0]
    best = model(x)

    def memory() -> float:
        return others[0] + fv.memory_report(model).taken

    limit = round(1.1 * whole.taken)
    options = ManagerOptions(background=False, status=False, clock=lambda: now[0])
    with fv.RuntimeManager(
        model, limits=fv.Limits(memory=limit), sensors={"memory": memory}, options=options
    ) as manager:

        def tick(count: int) -> None:
            for _ in range(count):
                now[0] += 0.05
                manager.step()

        resident = manager.setup.costs.resident
        assert resident[0] == whole.taken
        assert list(resident) == sorted(resident, reverse=True)
        tick(20)
        assert manager.index == 0
        others[0] = limit - whole.taken * 3 // 4  # another part of the process grows
        tick(100)
        assert manager.index > 0
        assert memory() <= limit
        assert fv.memory_report(model).taken == resident[manager.index]
        assert fv.current_map(model) == manager.frontier[manager.index]  # nothing is read below the map
        others[0], until = 0, time.monotonic() + 60
        while (manager.index or fv.memory_report(model).taken < whole.taken) and time.monotonic() < until:
            tick(1)
            model(x)
        assert manager.index == 0
        assert torch.equal(model(x), best)
        others[0] = limit - whole.taken * 3 // 4
        tick(100)
        assert manager.index > 0
    assert fv.memory_report(model).limit == whole.limit
    with fv.RuntimeManager(
        model, limits=fv.Limits(memory=limit), sensors={"memory": memory}, options=options
    ) as manager:
        tick(100)
        assert manager.index > 0
        fv.resize(model, memory=resident[2])  # another limit than the manager's is the most from then on
        others[0] = 0
        tick(3000)
        assert manager.index == 0
        assert fv.memory_report(model).limit == resident[2]
    assert fv.memory_report(model).limit == resident[2]
