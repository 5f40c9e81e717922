"""Use of experts and of embedding rows is counted relative to calibration, and residency follows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.checkpoint import runs as checkpoint_runs
from foveate.memory.runs import Run, Tag
from foveate.nn.registry import registry_of
from foveate.nn.residency.attach import resident_registry
from foveate.nn.residency.use import COUNT_EVERY, UseCounter
from tiny import generator, mlp, rows


def _run(weight: str, first: int = 0, last: int = 1) -> Run:
    return Run(weight=weight, plane=0, first=first, last=last, offset=0, size=64, checksum="", tag=Tag(level=2))


def test_experts_are_compared_with_their_share_in_calibration() -> None:
    model = mlp((32, 32, 32, 32))
    fv.quantize(model, rows(32, 32), objective=fv.Logits(), progress=False)
    names = [f"layers.3.experts.{i}.down_proj:weight" for i in range(3)]
    sites = [s for s in registry_of(model).sites if s.kind == "weight"]
    # in calibration the first expert had half of the rows, the others a quarter each
    shares = (16, 8, 8)
    of_experts = [replace(s, name=n, rows_read=r) for s, n, r in zip(sites, names, shares, strict=True)]
    modules = {name: model[2 * i] for i, name in enumerate(names)}
    counter = UseCounter(of_experts, modules, {})  # type: ignore[arg-type]
    assert counter.counts
    runs = [*map(_run, names), _run("other")]
    assert counter.rates(runs) == [1.0] * 4  # nothing was called yet
    counter.begin_pass()
    for i, count in enumerate((10, 30, 0)):
        if count:
            model[2 * i](torch.randn(count, 32))
    assert counter.rates(runs) == pytest.approx([0.5, 3.0, 0.0, 1.0])
    assert counter.rates(runs) == [1.0] * 4  # counted from then on
    counter.end_pass()
    for _ in range(COUNT_EVERY - 1):  # passes that do not count leave the experts without hooks
        counter.begin_pass()
        assert not any(module._forward_pre_hooks for module in modules.values())
        counter.end_pass()
    counter.begin_pass()
    assert all(module._forward_pre_hooks for module in modules.values())
    counter.end()
    model[0](torch.randn(4, 32))
    assert counter.rates(runs) == [1.0] * 4


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.embed(ids))
        return y


def test_rows_that_are_looked_up_more_often_get_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_runs, "LEAST_RUN", 1024)
    torch.manual_seed(0)
    model = _Words()
    ids = torch.randint(0, 256, (64, 16), generator=generator(0))
    profile = fv.quantize(model, [ids], objective=fv.Logits(), progress=False)
    fv.save(model, tmp_path / "words")
    with torch.device("meta"):
        skeleton = _Words()
    limit = (profile.uniform(2).bytes_resident + profile.uniform(8).bytes_resident) // 2
    loaded = fv.load(tmp_path / "words", memory=limit, model=skeleton)
    registry = resident_registry(loaded)
    low = torch.randint(0, 64, (4, 16), generator=generator(1))  # the first quarter of the rows

    def mean_level() -> float:
        return float(registry.residency.caps["embed:weight"][:4].float().mean())

    before = mean_level()
    for _ in range(64 * 60):
        loaded(low)
        if mean_level() == 8:
            break
    assert before < 8
    assert mean_level() == 8
    assert fv.memory_report(loaded).taken <= limit
