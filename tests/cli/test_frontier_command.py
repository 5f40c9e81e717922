"""`foveate allocate --frontier`, `--point` and `--latency`, and the frontier in `foveate inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import foveate as fv

Run = Callable[..., Result]


def test_a_frontier_is_stored_and_shown(run: Run, folder: Path) -> None:
    plan = fv.read_head(folder).plan
    result = run("allocate", folder, "--frontier", 12)
    assert result.exit_code == 0, result.output
    assert "frontier of 12 maps, not measured" in result.stdout
    assert "nothing is timed" in result.stderr
    assert fv.read_head(folder).plan == plan
    assert fv.load_frontier(folder) == fv.frontier(fv.load_profile(folder), 12)
    assert "frontier of 12 maps" in run("inspect", folder).stdout
    result = run("allocate", folder, "--point", 4.5)
    assert result.exit_code == 0, result.output
    chain = fv.load_frontier(folder)
    assert fv.read_head(folder).plan == chain[chain.find("4.5")]


def test_a_frontier_is_measured_and_gives_latency(run: Run, folder: Path, text_file: Path) -> None:
    words = ("--frontier", 6, "--data", text_file, "--samples", 2, "--length", 32, "--json")
    result = run("allocate", folder, *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["frontier"]
    chain = fv.load_frontier(folder)
    assert found["points"][0]["divergence"] == chain.points[0].divergence
    assert (found["maps"], found["points"][0]["index"], found["points"][-1]["index"]) == (6, 0, 5)
    assert found["unit"] == "KL, nats"
    shown = json.loads(run("inspect", folder, "--json").stdout)
    assert shown["frontier"] == found
    assert "times on" in run("inspect", folder).stdout
    timings = fv.load_profile(folder).timings
    assert timings is not None
    seconds = timings.seconds_of(fv.load_profile(folder).uniform(8))
    result = run("allocate", folder, "--latency", f"{seconds + 1}s")
    assert result.exit_code == 0, result.output
    assert "more than every weight at 8 bits takes" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--point", "4.5"), "holds no frontier"),
        (("--point", "4.5", "--bits", 4), "give --point or a budget, not both"),
        (("--frontier", 1), "points (=1) must be at least 2"),
        (("--frontier", 8, "--dry-run"), "it cannot be a dry run"),
        (("--latency", "1s"), "the profile has no times"),
        (("--latency", "soon"), "time (='soon') is not a number of seconds"),
    ],
)
def test_frontiers_and_latency_are_refused(run: Run, folder: Path, words: tuple[object, ...], message: str) -> None:
    before = (folder / "foveate.json").read_bytes()
    result = run("allocate", folder, *words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert (folder / "foveate.json").read_bytes() == before
