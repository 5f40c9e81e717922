"""`foveate audit`."""

from __future__ import annotations

import json
from pathlib import Path

from test_commands import FAST, Run


def test_audit_compares_measured_with_predicted(run: Run, folder: Path, text_file: Path) -> None:
    words = ("audit", folder, "--data", text_file, *FAST, "--sites", "*.down_proj", "--levels", "2,4")
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(e["site"], e["level"]) for e in found["sites"]] == [
        (f"model.layers.{i}.mlp.down_proj:weight", level) for i in (0, 1) for level in (2, 4)
    ]
    assert found["unit"] == "KL, nats"
    for two, four in (found["sites"][:2], found["sites"][2:]):
        assert two["measured"] > 4 * four["measured"] > 0
        assert two["predicted"] > 4 * four["predicted"] > 0
    table = run(*words).stdout
    assert "model.layers.1.mlp.down_proj:weight" in table
    assert f"geometric mean: {found['ratio']:.2f}" in table


def test_a_pattern_of_nothing_is_refused_in_one_line(run: Run, folder: Path, text_file: Path) -> None:
    result = run("audit", folder, "--data", text_file, *FAST, "--sites", "nothing")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "pattern 'nothing:weight' matches none" in result.stderr


def test_levels_are_refused_before_any_work_is_announced(run: Run, folder: Path, text_file: Path) -> None:
    result = run("audit", folder, "--data", text_file, *FAST, "--levels", "9")
    assert result.exit_code == 2
    top = run("audit", folder, "--data", text_file, *FAST, "--levels", "8")
    assert top.exit_code == 2
    assert top.stderr == "error: levels (=8) lower no weight: the highest level is 8\n"
    inputs = run("audit", folder, "--data", text_file, *FAST, "--sites", "lm_head:input", "--levels", "6")
    assert inputs.stderr == "error: input level (=6) is not one of 4, 8, 16, 32\n"
    assert result.stderr == "error: level (=9) is not one of 0, 2, 3, 4, 6, 8, 16, 32\n"
