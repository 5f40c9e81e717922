"""`foveate generate --limits`, `foveate top` and the options of `foveate bench runtime`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import foveate as fv
from foveate.runtime.options import ManagerOptions
from tiny import quantized_mlp, rows

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_generate_within_limits_says_what_moved(run: Run, folder: Path) -> None:
    words = ("generate", folder, "--prompt", "def f", "--max-tokens", 4)
    result = run(*words, "--limits", "latency=60s,quality=5", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["moves"] == []  # a minute a token is never exceeded
    assert found["tokens"] == json.loads(run(*words, "--json").stdout)["tokens"]
    assert "moves" not in json.loads(run(*words, "--json").stdout)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--limits", "queue_wait=1s"), "has no queue"),
        (("--limits", "speed=1"), "NAME=VALUE"),
        (("--limits", "latency=1s", "--schedule", "8,4"), "at most one of --limits and --schedule"),
    ],
)
def test_limits_that_a_text_cannot_keep_to_are_refused(
    run: Run, folder: Path, words: tuple[str, ...], says: str
) -> None:
    result = run("generate", folder, "--prompt", "def f", *words)
    assert result.exit_code == 2
    assert says in result.stderr


def test_top_shows_a_manager_of_this_process(run: Run) -> None:
    model, _ = quantized_mlp()
    nobody = run("top")
    assert nobody.exit_code == 2
    assert "no process of this user runs a RuntimeManager" in nobody.stderr
    now = [0.0]
    options = ManagerOptions(background=False, clock=lambda: now[0])
    limits = fv.Limits(queue_wait="200ms", power=45, quality=1.0)
    sensors = {"queue_wait": lambda: 0.9, "power": lambda: "there is no meter"}
    with fv.RuntimeManager(model, limits=limits, sensors=sensors, options=options) as manager:
        for _ in range(12):
            now[0] += 0.1
            model(rows()[0])
            manager.step()
        shown = run("top", "--once")
        found = json.loads(run("top", os.getpid(), "--json").stdout)
    assert shown.exit_code == 0, shown.output
    assert manager.index > 0
    for part in (
        "unavailable: there is no meter",
        "900.0 ms",
        "200.0 ms",
        f"index {found['index']} of",
        "is above its",
    ):
        assert part in shown.stdout, shown.stdout
    assert found["index"] > 0
    assert found["moves"][-1]["index"] == found["index"]


def test_options_of_the_benchmark_are_of_that_benchmark(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("bench", "switch", "--minutes", 1)
    assert result.exit_code == 2
    assert "--minutes is for the benchmark runtime or trace, not for switch" in result.stderr
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    result = run("bench", "runtime", "--minutes", 0)
    assert result.exit_code == 2
    assert "FOVEATE_DATA" in result.stderr
