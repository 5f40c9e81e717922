"""`python -m benchmarks`, and what it must not have to do with the wheel."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import benchmarks
import foveate
from benchmarks.__main__ import app
from foveate.bench.shared.result import Measured
from foveate.errors import FoveateError

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = {"bits": 8, "bytes": 10, "rows": 1, "seconds": 1.0, "bandwidth": 12.0}
    rounds = [turn | {"form": form} for form in ("foveate 4", "foveate 8", "a peer")]

    def found(name: str, **_: Any) -> dict[str, Any]:
        return {"name": name, "figures": {"ratio": 0.5}, "rounds": rounds}

    monkeypatch.setattr("benchmarks.__main__.run", found)


def test_every_name_is_a_module_with_measure_and_a_command(run: Run) -> None:
    assert all(callable(import_module(module).measure) for module in benchmarks.MODULES.values())
    said = run("--help").stdout
    assert all(name in said for name in benchmarks.NAMES)
    assert run("nothing").exit_code == 2
    with pytest.raises(FoveateError, match=r"'speed'.*kernels, .*quality_peers"):
        benchmarks.run("speed")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_every_command_prints_and_writes_one_object(run: Run, tmp_path: Path, name: str) -> None:
    result = run(name, "--json", "--out", tmp_path / "b.json")
    assert json.loads(result.stdout)["name"] == name
    assert json.loads((tmp_path / "b.json").read_text())["figures"] == {"ratio": 0.5}
    assert "ratio" in run(name).stdout
    assert run(name, "--out", tmp_path / "no" / "b.json").exit_code == 2


def test_parts_and_share_are_handed_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "benchmarks.training.activations.measure", lambda **options: asked.append(options) or Measured({"met": 1.0})
    )
    assert "met" in run("activations", "--part", "budgets", "--part", "times", "--share", "0.5").stdout
    assert run("activations").exit_code == 0
    assert asked == [{"parts": ["budgets", "times"], "share": 0.5}, {}]
    assert run("switch", "--part", "times").exit_code == 2


def test_switches_models_and_bits_are_handed_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "benchmarks.quality.inputs.measure", lambda **options: asked.append(options) or Measured({"met": 1.0})
    )
    words = ("--switch", "feedback", "--model", "lm", "--bits", "4", "--bits", "5", "--share", "0.5")
    assert "met" in run("inputs", *words).stdout
    assert asked == [{"switches": ["feedback"], "models": ["lm"], "bits": [4.0, 5.0], "share": 0.5}]
    assert run("inputs", "--share", "2").exit_code == 2


def test_peers_and_windows_of_quantizing_are_handed_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "benchmarks.peers.quantizing.compare.measure", lambda **options: asked.append(options) or Measured({"met": 1.0})
    )
    words = ("--peer", "gptqmodel", "--peer", "llama_cpp", "--windows", "2", "--work", "kept")
    assert "met" in run("quantizing_peers", *words).stdout
    assert run("quantizing_peers").exit_code == 0
    assert asked == [{"peers": ["gptqmodel", "llama_cpp"], "windows": 2, "work": Path("kept")}, {"peers": ()}]
    assert run("quantizing_peers", "--windows", "0").exit_code == 2


@pytest.mark.usefixtures("fake")
def test_peers_are_drawn_and_nothing_else_is(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "speed.svg"
    assert run("peers", "--plot", file).exit_code == 0
    assert "a peer" in file.read_text()
    assert run("peers", "--plot", tmp_path / "no" / "speed.svg").exit_code == 2
    assert run("switch", "--plot", file).exit_code == 2


def test_the_wheel_imports_nothing_that_is_not_installed() -> None:
    for file in Path(foveate.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {n.partition(".")[0] for n in names} & {"benchmarks", "examples"}, file
