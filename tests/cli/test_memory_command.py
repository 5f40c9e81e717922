"""--memory: what would stay in memory, and text from a model whose planes come and go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import foveate as fv
from foveate.sizes import format_bytes

Run = Callable[..., Result]


def test_inspect_says_what_a_limit_does(run: Run, folder: Path) -> None:
    profile = fv.load_profile(folder)
    limit = profile.uniform(4).bytes_resident
    result = run("inspect", folder, "--memory", limit, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["memory"]
    loaded = fv.load(folder, memory=limit)
    report, plan = fv.memory_report(loaded), fv.current_map(loaded)
    assert (found["limit"], found["fixed"], found["stays"]) == (limit, report.fixed, report.resident)
    assert found["stays"] + found["waits"] == report.stored
    assert found["bytes_a_token"] == plan.bytes_read < found["bytes_a_token_of_all_planes"]
    assert found["predicted_loss"] == pytest.approx(profile.predict(plan))
    assert found["predicted_loss_of_all_planes"] == pytest.approx(profile.predict(profile.uniform(8)))
    result = run("inspect", folder, "--memory", limit)
    assert result.exit_code == 0, result.output
    assert "planes that wait on disk" in result.stdout
    assert format_bytes(found["waits"]) in result.stdout
    result = run("inspect", folder, "--memory", 10)
    assert result.exit_code == 2
    assert "is less than the least possible needs" in result.stderr


def test_generate_within_a_limit(run: Run, folder: Path) -> None:
    profile = fv.load_profile(folder)
    limit = profile.uniform(4).bytes_resident
    words = ("generate", folder, "--prompt", "def f", "--max-tokens", 6)
    result = run(*words, "--memory", limit, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["memory"]["limit"] == limit
    assert found["memory"]["fixed"] + found["memory"]["resident"] <= limit
    assert not found["memory"]["fallback_count"]
    # everything fits: the same text as without a limit
    whole = json.loads(run(*words, "--level", 8, "--json").stdout)
    assert json.loads(run(*words, "--memory", "1GiB", "--level", 8, "--json").stdout)["tokens"] == whole["tokens"]
    result = run(*words, "--memory", limit, "--schedule", "2,4", "--every", 3, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["switches"]) == 2
    result = run(*words, "--memory", "much")
    assert result.exit_code == 2
