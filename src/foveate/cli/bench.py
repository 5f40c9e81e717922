"""`foveate bench`: measure this machine, and how fast models on planes run on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.shared.console import check_writable, emit, figures_table, show
from foveate.cli.shared.options import Json
from foveate.errors import CheckpointError

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON object to this file.")]


def bench(
    name: Annotated[str, typer.Argument(help="The benchmark: kernels, switch, load, decode, saved or inputs.")],
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Run a benchmark and print its figures; with --json also the machine and the raw rounds."""
    from foveate import bench as benchmarks

    check_folder_of(out)
    show_result(benchmarks.run(name), out, json_output)


def check_folder_of(file: Path | None) -> None:
    """Raise `CheckpointError` before the work if a file is given and cannot be written."""
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        raise CheckpointError(f"{file.parent} is not a folder to write {file.name} into")
    check_writable(file)


def show_result(result: Mapping[str, Any], out: Path | None, json_output: bool) -> None:
    """Print a benchmark's result as a JSON object or as a table, and write it to a file if one is given."""
    text = emit(result, out)
    if json_output:
        print(text)
    else:
        show(figures_table(result["name"], result["figures"]))
