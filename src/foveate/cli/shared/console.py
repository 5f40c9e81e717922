"""Output of the commands: results on stdout, as tables or as one JSON object; everything else on stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from foveate.errors import CheckpointError

#: Width of tables in characters where stdout is no terminal.
_WIDTH = 120
log = logging.getLogger("foveate")


def show(*things: RenderableType) -> None:
    """Print results on stdout for a human reader."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    for thing in things:
        console.print(thing)


def emit(result: Mapping[str, Any], file: Path | None = None) -> str:
    """The text of a command's JSON object, with null for NaN; it is also written to `file` if one is given."""
    text = json.dumps(_plain(result), indent=2, allow_nan=False)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    return text


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before any work, by a test in the nearest folder that exists.

    Raises:
        CheckpointError: nothing can be written there.
    """
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    try:
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {parent} is not a folder that can be written") from error


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def plain_table(*heads: str) -> Table:
    """An empty table whose first column holds text and whose other columns hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column(heads[0])
    for head in heads[1:]:
        table.add_column(head, justify="right")
    return table


def figures_table(title: str, figures: Mapping[str, float]) -> Table:
    """A table of names and numbers."""
    table = plain_table(title, "")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    return table
