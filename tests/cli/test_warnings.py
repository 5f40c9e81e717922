"""Between a command's lines stand its own warnings, and nobody else's."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import foveate
from foveate.cli import app, demo
from foveate.cli.demo import show
from foveate.cli.demo.training import Recipe

OURS = str(Path(foveate.__file__).parent / "nn" / "cache.py")
THEIRS = "/somewhere/site-packages/transformers/generation/utils.py"
SAID = ((UserWarning, OURS), (RuntimeWarning, OURS), (FutureWarning, OURS), (DeprecationWarning, OURS))
SAID += ((UserWarning, THEIRS), (FutureWarning, THEIRS))


def _shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    for category, file in SAID:
        app._warn(f"{category.__name__} in {Path(file).name}", category, file, 1)
    return capsys.readouterr().err.splitlines()


def test_only_our_own_and_no_deprecations(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    assert _shown(capsys) == ["warning: UserWarning in cache.py", "warning: RuntimeWarning in cache.py"]
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert len(_shown(capsys)) == len(SAID)


@pytest.mark.filterwarnings("default")
def test_what_another_library_says_is_not_in_the_demo(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    tiny = Recipe(width=64, hidden=128, layers=1, heads=2, window=48, batch=4, steps=2, seconds=60)
    true_run, true_argument = demo.run, show.cache_argument

    def noisy(*given: object) -> object:
        warnings.warn_explicit("will go in release 6", FutureWarning, THEIRS, 1)
        return true_argument(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(show, "cache_argument", noisy)
    monkeypatch.setattr(demo, "run", lambda **options: true_run(**options, recipe=tiny))
    done = run("demo", "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert done.exit_code == 0, done.output
    assert "Change precision in mid-sentence" in done.stdout
    for said in (done.stdout, done.stderr):
        assert "release 6" not in said
        assert "past_key_values" not in said
        assert "warning" not in said.lower()
