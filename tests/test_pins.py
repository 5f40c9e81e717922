"""constraints.txt has a pin, within the range of pyproject.toml, for every package that foveate names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r'"([a-z][a-z0-9-]*>=[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("named", [*map(Requirement, NAMED)], ids=str)
def test_what_is_named_is_pinned_within_its_range(named: Requirement) -> None:
    (pin,) = [pin for pin in PINS if pin.name == named.name]
    (exact,) = pin.specifier
    assert exact.operator == "=="
    assert named.specifier.contains(exact.version)


def test_every_pin_is_exact_and_there_once() -> None:
    assert {"torch", "transformers", "safetensors", "typer", "rich", "pytest", "hatchling"} <= {p.name for p in PINS}
    assert all(str(pin.specifier).startswith("==") for pin in PINS)
    assert len({pin.name for pin in PINS}) == len(PINS)


def test_the_oldest_releases_are_the_bounds_of_pyproject(capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    runpy.run_path(str(ROOT / ".ci" / "oldest.py"), run_name="__main__")
    printed = capsys.readouterr().out.split()
    assert [word.partition("==")[0] for word in printed] == ["transformers", "safetensors", "typer", "rich"]
    assert all(word.replace("==", ">=") in NAMED for word in printed)
