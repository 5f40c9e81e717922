"""`foveate bench`: judge this machine, and what a model on planes can do on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.shared.console import check_writable, emit, figures_table, show
from foveate.cli.shared.options import Json
from foveate.errors import CheckpointError

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the object to this file.")]


def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark; a wrong name lists them.")],
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Run a benchmark and print its figures, the machine and the raw rounds."""
    from foveate import bench as benchmarks

    check_folder_of(out)
    show_result(benchmarks.run(name), out, json_output)


def check_folder_of(file: Path | None) -> None:
    """Raise `CheckpointError` where a file, if one is given, cannot be written: before the work, not after it."""
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        raise CheckpointError(f"{file.parent} is not a folder to write {file.name} into")
    check_writable(file)


def show_result(found: Mapping[str, Any], out: Path | None, json_output: bool) -> None:
    """What a benchmark gave back: to a file if one is given, and to stdout as one object or as a table of figures."""
    text = emit(found, out)
    if json_output:
        print(text)
    else:
        show(figures_table(found["name"], found["figures"]))
