"""allocate, inspect, eval, generate, report, bench, and the command itself."""

from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import foveate as fv
from foveate import cli
from foveate.cli import inspect as inspect_command

FAST = ("--samples", 2, "--length", 32)
Run = Callable[..., Result]


def test_allocate_stores_the_default_map(run: Run, folder: Path) -> None:
    result = run("allocate", folder, "--bits", 4.5, "--levels", "0,2,3,4,6,8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    plan = fv.read_head(folder).plan
    assert plan.bits == found["map"]["bits"] == pytest.approx(4.5, rel=0.005)
    assert found["map"]["predicted_loss"] < found["uniform"]["predicted_loss"]
    assert found["map"]["predicted_loss"] == pytest.approx(fv.load_profile(folder).predict(plan))


def test_allocate_dry_run_stores_nothing(run: Run, folder: Path) -> None:
    before = (folder / "foveate.json").read_bytes()
    result = run("allocate", folder, "--loss", 0.5, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "uniform at equal bytes" in result.stdout
    assert "nothing stored" in result.stdout
    assert (folder / "foveate.json").read_bytes() == before


@pytest.mark.parametrize("budget", [("--bits", 5.5), ("--bytes", "100KiB"), ("--loss", 1.0)])
def test_a_level_that_is_set_counts_in_the_budget(run: Run, folder: Path, budget: tuple[str, object]) -> None:
    words = (
        "--set",
        "model.layers.0.*=6",
        "--set",
        "model.layers.1.mlp.*:input=16",
        "--tie",
        "*.1.*.q_proj,*.1.*.k_proj",
    )
    result = run("allocate", folder, *budget, *words, "--per-weight", "--json")
    assert result.exit_code == 0, result.output
    plan = fv.read_head(folder).plan
    levels = {
        name: level for name, level in plan.levels.items() if name.startswith("model.layers.0.") and "weight" in name
    }
    assert set(levels.values()) == {6}
    assert plan.levels["model.layers.1.mlp.up_proj:input"] == 16
    assert (
        plan.levels["model.layers.1.self_attn.q_proj:weight"] == plan.levels["model.layers.1.self_attn.k_proj:weight"]
    )
    if budget[0] == "--bits":
        assert 5 < plan.bits <= 5.5001
    elif budget[0] == "--bytes":
        assert 92 * 1024 < plan.bytes_resident <= 100 * 1024
    else:
        assert plan.predicted_loss <= 1.0001


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bits", 99), "a budget of 99 bits is more than every weight at 8 bits takes, which is "),
        (("--bytes", "1GiB", "--levels", "2,4"), "a budget of 1.00 GiB is more than every weight at 4 bits takes"),
        (("--loss", 1000), "a loss of 1000 is more than every weight loses at 2 bits, the lowest level allowed"),
        (("--bits", 5), ""),
    ],
)
def test_a_budget_that_decides_nothing_is_said(run: Run, folder: Path, words: tuple[object, ...], message: str) -> None:
    result = run("allocate", folder, *words, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(message) if message else not result.stderr


def test_set_alone_changes_the_default_map(run: Run, folder: Path) -> None:
    result = run("allocate", folder, "--set", "*=4")
    assert result.exit_code == 0, result.output
    head = fv.read_head(folder)
    assert {head.plan.levels[s.name] for s in head.weight_sites()} == {4}
    assert run("allocate", folder, "--bits", 5, "--set", "*=4").exit_code == 0  # nothing is left to choose


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no budget"),
        (("--bits", 1), "the least possible is"),
        (("--bits", 4, "--bytes", "1MiB"), "exactly one"),
        (("--bits", 4, "--levels", "4,5"), "level (=5) is not one of"),
        (("--bits", 4, "--levels", "four"), "not a number"),
        (("--bits", 4, "--tie", "nothing,else"), "matches none"),
        (("--set", "nothing=4"), "'nothing' matches none"),
        (("--set", "lm_head=5"), "level (=5)"),
        (("--set", "lm_head:input=5"), "input level (=5)"),
        (("--set", "lm_head"), "not PATTERN=LEVEL"),
        (("--bits", 3, "--set", "model.*=8"), "leave nothing of the budget"),
        (("--bits", 4.5, "--set", "model.layers.*=6"), "for the weights that --set leaves: no map averages"),
        (("--bogus",), "No such option"),
    ],
)
def test_allocate_refuses(run: Run, folder: Path, words: tuple[object, ...], message: str) -> None:
    before = (folder / "foveate.json").read_bytes()
    result = run("allocate", folder, *words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert (folder / "foveate.json").read_bytes() == before


def test_inspect_shows_layers_or_weights(run: Run, folder: Path) -> None:
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    for word in ("model.layers.1", "lm_head", "in memory", "the whole folder", "float32"):
        assert word in result.stdout
    assert "q_proj" not in result.stdout
    assert "model.layers.1.self_attn.q_proj" in run("inspect", folder, "--all").stdout


def test_inspect_json_adds_up(run: Run, folder: Path) -> None:
    found = json.loads(run("inspect", folder, "--json").stdout)
    plan = fv.read_head(folder).plan
    assert [row["name"] for row in found["rows"]] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "lm_head",
    ]
    assert sum(row["bytes_stored"] for row in found["rows"]) + plan.other_bytes == found["map"]["bytes_stored"]
    assert sum(row["weights"] for row in found["rows"]) == found["weights"]
    each = json.loads(run("inspect", folder, "--all", "--json").stdout)
    assert len(each["rows"]) == 16
    assert sum(sum(row["tiles"].values()) for row in each["rows"]) == sum(s.tiles for s in plan.weight_sites())


def test_eval_measures_levels_beside_the_reference(run: Run, folder: Path, original: Path, text_file: Path) -> None:
    words = ("eval", folder, "--data", text_file, *FAST, "--reference", original)
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    maps = json.loads(result.stdout)["maps"]
    assert [m["label"] for m in maps] == [
        "8 bits",
        "6 bits",
        "4 bits",
        "3 bits",
        "2 bits",
        "default map",
        "original, float32",
    ]
    divergence = [m["divergence"] for m in maps]
    assert divergence[:5] == sorted(divergence[:5])
    assert divergence[-1] == 0
    assert maps[-1]["loss"] > 0
    table = run(*words, "--levels", "8,2").stdout
    assert "8 bits" in table
    assert "3 bits" not in table


def test_generate_writes_and_switches(run: Run, folder: Path) -> None:
    words = ("generate", folder, "--prompt", "def f(", "--max-tokens", 6)
    first = run(*words, "--schedule", "8,2", "--every", 2)
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("def f(")
    assert [mark in first.stderr for mark in ("[8 bits", "[2 bits", "[4 bits")] == [True, True, False]
    found = json.loads(run(*words, "--schedule", "8,2", "--every", 2, "--json").stdout)
    assert [(s["at"], s["level"]) for s in found["switches"]] == [(0, 8), (2, 2), (4, 8)]
    assert first.stdout == f"{found['prompt']}{found['text']}\n"
    assert len(found["tokens"]) == 6


@pytest.mark.parametrize("choice", [("--level", 3), ("--bits", 4.5), ()])
def test_generate_at_a_precision(run: Run, folder: Path, choice: tuple[object, ...]) -> None:
    words = (
        "generate",
        folder,
        "--prompt",
        "x",
        "--max-tokens",
        3,
        "--temperature",
        0.7,
        "--seed",
        5,
        "--json",
        *choice,
    )
    result = run(*words)
    assert result.exit_code == 0, result.output
    found, again = json.loads(result.stdout), json.loads(run(*words).stdout)
    assert found["tokens"] == again["tokens"]
    uniform3 = fv.load_profile(folder).uniform(3).bits
    assert found["bits"] == pytest.approx(
        {"--level": uniform3, "--bits": 4.5}.get(str(choice[:1][0]) if choice else "", 5), rel=0.005
    )


def test_generate_with_a_packed_cache(run: Run, folder: Path) -> None:
    words = ("generate", folder, "--prompt", "x" * 100, "--max-tokens", 4, "--json")
    exact, same, packed = (
        json.loads(run(*words, *more).stdout) for more in ((), ("--cache-bits", 32), ("--cache-bits", 2))
    )
    assert same["tokens"] == exact["tokens"]
    assert packed["cache_bytes"] < same["cache_bytes"]
    assert "cache_bytes" not in exact


def test_generate_refuses(run: Run, folder: Path) -> None:
    for words, message in (
        (("--prompt", "x", "--level", 5), "level (=5)"),
        (("--prompt", "x", "--level", 4, "--bits", 4), "at most one"),
        (("--prompt", ""), "the prompt has 0 tokens"),
        (("--prompt", "x" * 200), "the prompt has 200 tokens"),
        ((), "--prompt"),
    ):
        result = run("generate", folder, *words)
        assert result.exit_code == 2, words
        assert message in result.stderr


def test_generate_without_a_tokenizer(run: Run, folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    result = run("generate", bare, "--prompt", "x")
    assert result.exit_code == 2
    assert "copy the original model's tokenizer files into it" in result.stderr


def test_generate_stops_where_positions_end(run: Run, folder: Path) -> None:
    result = run("generate", folder, "--prompt", "x" * 126, "--max-tokens", 9, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["tokens"]) == 2


def test_report_writes_a_page(run: Run, folder: Path, text_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    assert run("report", folder, "-o", page).exit_code == 0
    without = page.read_text()
    assert "model.layers.1" in without
    assert "What was measured" not in without
    result = run("report", folder, "-o", page, "--data", text_file, *FAST, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"] == str(page)
    assert "What was measured" in page.read_text()
    assert run("report", folder, "-o", tmp_path / "nowhere" / "r.html").exit_code == 2


@pytest.mark.parametrize("command", ["inspect", "allocate", "eval", "generate", "report"])
def test_a_folder_that_is_missing_or_damaged(run: Run, folder: Path, tmp_path: Path, command: str) -> None:
    more: dict[str, tuple[object, ...]] = {
        "allocate": ("--bits", 4),
        "generate": ("--prompt", "x"),
        "report": ("-o", tmp_path / "x"),
    }
    missing = run(command, tmp_path / "nowhere", *more.get(command, ()))
    (folder / "foveate.json").write_text('{"format": "foveate", ')
    damaged = run(command, folder, *more.get(command, ()))
    for result in (missing, damaged):
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.output
    assert not (tmp_path / "x").exists()


def test_a_reference_is_checked_before_the_work(run: Run, folder: Path, text_file: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "no"
    for reference, message in ((folder, "was written by foveate: give the original"), (nowhere, "no folder")):
        result = run("eval", folder, "--data", text_file, *FAST, "--reference", reference)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr
    result = run("report", folder, "-o", tmp_path / "r.html", "--reference", folder)
    assert result.exit_code == 2
    assert result.stderr == "error: --reference needs data to compare on: give --data or --tokens\n"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files")
def test_what_cannot_be_written_is_refused_before_the_work(run: Run, folder: Path, text_file: Path) -> None:
    report = ("report", folder, "-o", "/proc/r.html", "--data", text_file)
    for words in (report, ("bench", "switch", "-o", "/proc/r.json"), ("demo", "-o", "/proc/demo")):
        result = run(*words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.endswith("/proc is not a folder that can be written\n")
        assert len(result.stderr.splitlines()) == 1


def test_bench_prints_one_object(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(name: str, sizes: Any = None) -> dict[str, Any]:
        return {"name": name, "figures": {"bytes_moved": 0.0, "unknown": float("nan")}}

    monkeypatch.setattr("foveate.bench.run", fake)
    result = run("bench", "switch", "--json", "--out", tmp_path / "b.json")
    assert json.loads(result.stdout) == {"name": "switch", "figures": {"bytes_moved": 0.0, "unknown": None}}
    assert json.loads((tmp_path / "b.json").read_text())["name"] == "switch"
    assert "bytes_moved" in run("bench", "switch").stdout
    assert run("bench", "switch", "--out", tmp_path / "no" / "b.json").exit_code == 2


def test_bench_lists_its_names(run: Run) -> None:
    result = run("bench", "nothing")
    assert result.exit_code == 2
    assert "kernels" in result.stderr


def test_demo_is_handed_its_options(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("foveate.cli.demo.run", lambda **options: seen.update(options))
    assert run("demo", "--out", tmp_path, "--cache", tmp_path / "c", "--json").exit_code == 0
    assert seen == {"out": tmp_path, "cache": tmp_path / "c", "json_output": True}


def test_help_and_unknown_commands(run: Run) -> None:
    for words in ((), ("--help",), ("quantize", "--help")):
        result = run(*words)
        assert result.exit_code == 0
        assert "Usage" in result.stdout
    assert run("--version").stdout == f"{fv.__version__}\n"
    result = run("fly")
    assert result.exit_code == 2
    assert result.stderr == "error: No such command 'fly'.\n"


def test_an_interruption_exits_130(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_command, "opened", interrupted)
    result = run("inspect", folder)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_without_typer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_import = builtins.__import__

    def no_typer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "typer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return true_import(name, *args, **kwargs)

    for module in [m for m in sys.modules if m.startswith("foveate.cli.app")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", no_typer)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert 'pip install "foveate[cli]"' in capsys.readouterr().err


def test_the_package_runs_as_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "foveate", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"{fv.__version__}\n"
