"""Imports point one way: a room imports only rooms of lower levels, and rooms on one level do not import each other."""

from __future__ import annotations

import ast
import statistics
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import foveate

SOURCE = Path(foveate.__file__).parent

#: Rooms by level, as the design has them. A room is a folder or a file; `progress` and `version` are for any of them.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "progress", "version"),
    ("files", "formats", "sizes"),
    ("kernels",),
    ("memory",),
    ("planes",),
    ("precision",),
    ("collect", "rounding", "activations"),
    ("sensitivity", "allocate", "checkpoint"),
    ("nn",),
    ("prepare", "calibrate", "kvcache", "folder"),
    ("evaluate", "inputs", "importance", "runtime", "adapters", "pretrained"),
    ("serve",),  # below the bench that measures it
    ("bench", "report"),
    ("cli",),
)
#: Lines of a file, at most.
LONGEST = 400
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def _room(module: str) -> str:
    """`foveate.nn.modules` -> `nn`."""
    return module.split(".")[1] if "." in module else ""


@cache
def _modules() -> tuple[tuple[str, Path], ...]:
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        parts = ("foveate", *file.relative_to(SOURCE).with_suffix("").parts)
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), file))
    return tuple(found)


def _imports(module: str, file: Path) -> Iterator[tuple[int, str]]:
    """Every module of ours that a file imports, at its head or inside a function."""
    submodules = {name for name, _ in _modules()}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "foveate")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            if base.split(".")[0] == "foveate":
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield node.lineno, full if full in submodules else base


def test_every_room_has_a_level() -> None:
    rooms = {_room(module) for module, _ in _modules()} - {"", "__main__"}
    assert rooms <= set(LEVEL_OF), f"rooms without a level: {sorted(rooms - set(LEVEL_OF))}"


@pytest.mark.parametrize("module", [m for m, _ in _modules() if _room(m) not in ("", "__main__")])
def test_imports_point_down(module: str) -> None:
    room = _room(module)
    wrong = []
    for line, imported in _imports(module, dict(_modules())[module]):
        other = _room(imported)
        if other == room:
            continue
        # the top of the package is for users, and for the rooms that are its users
        if not other:
            if LEVEL_OF[room] < LEVEL_OF["evaluate"]:
                wrong.append(f"line {line}: the package itself")
        elif LEVEL_OF[other] >= LEVEL_OF[room]:
            wrong.append(f"line {line}: {imported}, of level {LEVEL_OF[other]} (this is {LEVEL_OF[room]})")
    assert not wrong, f"{module} imports {'; '.join(wrong)}"


def test_the_check_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "levels.py"
    file.write_text(
        "def f():\n    from foveate import nn\n    import foveate.cli.app\n    from ..precision.maps import Site\n"
    )
    assert sorted(_imports("foveate.formats.levels", file)) == [
        (2, "foveate.nn"),
        (3, "foveate.cli.app"),
        (4, "foveate.precision.maps"),
    ]


def test_modules_are_short_and_teach() -> None:
    lengths = {}
    for module, file in _modules():
        text = file.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring at its head"
        lengths[module] = len(text.splitlines())
    for file in (*Path(__file__).parent.rglob("*.py"), *SOURCE.rglob("*.cpp"), *SOURCE.rglob("*.h")):
        lengths[file.name] = len(file.read_text().splitlines())
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
    assert statistics.median(lengths.values()) < LONGEST / 2


def test_no_module_is_in_a_circle_of_imports() -> None:
    """Imports for type checkers count too: what leads back to itself cannot be read from the bottom up."""
    files = dict(_modules())
    imports = {module: {name for _, name in _imports(module, file)} & set(files) for module, file in files.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(imports[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in imports:
        if module != "foveate":  # the top of the package is what its users import
            visit(module, ())


def test_no_folder_is_two_ideas() -> None:
    folders = Counter(file.parent.relative_to(SOURCE) for _, file in _modules() if file.name != "__init__.py")
    assert {str(folder): files for folder, files in folders.items() if files > 13} == {}
