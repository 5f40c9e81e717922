"""The benchmark of caches, with a peer that is the real script on a cache of the test's."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.cases import Case
from benchmarks.peers.child import SCRIPTS
from benchmarks.quality import cache as bench
from foveate.collect.objectives import Logits
from foveate.kvcache.calibrate import calibrate_cache
from foveate.precision.budgets import Budget
from tiny import generator, llama

STUB = """
import importlib.util
import sys
sys.path.insert(0, {scripts!r})
import transformers

class Rough(transformers.DynamicCache):
    def __init__(self, config, backend, nbits, axis_key, axis_value, q_group_size, residual_length):
        if backend == "hqq":
            raise ValueError("not here")
        super().__init__(config=config)
        self.steps = 2.0 ** nbits

    def update(self, keys, values, layer, *args, **kwargs):
        return super().update((keys * self.steps).round() / self.steps, values, layer)

transformers.QuantizedCache = Rough
spec = importlib.util.spec_from_file_location("real", {script!r})
caches = importlib.util.module_from_spec(spec)
spec.loader.exec_module(caches)
known = caches.metadata.version
caches.metadata.version = lambda package: "1.2" if package == "optimum-quanto" else known(package)
caches.serve({{"decode": caches.decode}})
"""


@dataclass(frozen=True)
class Ready:
    """An environment that is this one."""

    python: Path
    built: bool = True


def case() -> Case:
    model = llama(max_position_embeddings=512)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(6)
    batches = [torch.randint(3, 50, (4, 256), generator=generator(seed)) for seed in range(3)]
    return Case("tiny", model, batches[:2], batches[2:], Logits(), "loss", lambda *_: torch.zeros(1), "token")


def test_everything_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "caches.py").write_text(STUB.format(scripts=str(SCRIPTS), script=str(SCRIPTS / "caches.py")))
    monkeypatch.setitem(bench.ENVIRONMENTS, "caches", Ready(Path(sys.executable)))
    monkeypatch.setattr(bench, "SCRIPTS", tmp_path)
    monkeypatch.setattr(bench, "LONG", 600)
    monkeypatch.setattr(bench, "_ROUNDS", 1)
    settings = [bench.Setting("quanto", 4, 0, 0), bench.Setting("hqq", 4, 0, 0), bench.Setting("quanto", 2, 0, 0)]
    found = bench.measure_cases([case()], settings)
    figures = found.figures
    own = [figures[f"cache_kl_uniform_b{level}_tiny"] for level in (2, 4, 8)]
    assert own[0] > own[1] > own[2] > 0
    assert figures["cache_kl_b4"] == figures["cache_kl_b4_tiny"] > 0
    assert 16 / (4 + 32) < figures["cache_memory_ratio_b4"] < 4
    assert figures["cache_memory_ratio_b4"] < figures["cache_memory_ratio_b4_float32"] < 8
    assert figures["cache_memory_ratio_b4_while_read"] < figures["cache_memory_ratio_b4"]
    assert figures["cache_step_time_ratio_tiny"] > 0
    peers = [r for r in found.rounds if "peer" in r]
    assert [r["peer"] for r in peers] == ["quanto 4 bits, axes 0 0", "quanto 2 bits, axes 0 0"]
    assert all(r["ratio"] == r["ours"] / r["divergence"] for r in peers)
    assert peers[0]["divergence"] < peers[1]["divergence"]
    assert peers[0]["ours"] < peers[1]["ours"]
    assert figures["cache_kl_over_transformers"] == peers[0]["ratio"]
    assert figures["cache_kl_over_transformers_b2"] == peers[1]["ratio"]
    assert any("hqq 4 bits, axes 0 0: not measured" in note and "not here" in note for note in found.notes)
    assert any("optimum-quanto 1.2" in note for note in found.notes)


def test_without_an_environment_ours_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.ENVIRONMENTS, "caches", Ready(Path(sys.executable), built=False))
    text = bench.Text(case())
    with bench._Transformers() as peers:
        rows, notes = bench.peer_rows(text.case, text, calibrated(), [bench.Setting("quanto", 4, 0, 0)], peers)
    assert rows == []
    assert "make bench-peers" in notes[0]


def calibrated() -> Any:
    return calibrate_cache(case().model, case().calibration, progress=False)


def test_bytes_are_what_caches_hold() -> None:
    text = bench.Text(case())
    profile = calibrated()
    block = profile.sites[0].group
    plan = profile.plan(Budget(bits=4.5))
    numbers = sum(s.rows * s.columns for s in profile.sites)
    half = [
        profile.nbytes(plan, tokens) - (tokens - max(tokens - 32, 0) // block * block) * 2 * numbers
        for tokens in range(129, 257)
    ]
    # exact tokens at 16 bits, as both sides are counted
    assert text.own_bytes_at(plan.cache_bits, block) * numbers == pytest.approx(sum(half) / len(half), rel=1e-6)
    # transformers packs the prompt, and all that follow once there are 128 of them
    theirs = bench.Setting("quanto", 4, 0, 0)
    assert theirs.bytes_at(100, 3) == pytest.approx(100 * 4.5 / 8 + 2 * 2)
    assert theirs.bytes_at(100, 128) == pytest.approx((127 * 100 * 4.5 / 8 + 2 * 127 * 64 + 228 * 4.5 / 8) / 128)


def test_nothing_as_small_is_said() -> None:
    text, profile = bench.Text(case()), calibrated()
    assert bench._within(profile, text, 1.0) is None
    plan = bench._within(profile, text, bench.Setting("quanto", 4, 0, 0).bytes_at(text.prompt, text.steps))
    assert plan is not None
    assert text.own_bytes_at(plan.cache_bits, 64) <= bench.Setting("quanto", 4, 0, 0).bytes_at(text.prompt, text.steps)


def test_without_data_there_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    found = bench.measure()
    assert (found.figures, found.rounds) == ({}, ())
    assert "FOVEATE_DATA" in found.notes[0]
