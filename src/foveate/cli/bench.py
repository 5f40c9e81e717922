"""`foveate bench`: measure this machine, and how fast models on planes run on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.shared.console import check_writable, emit, figures_table, show
from foveate.cli.shared.options import Json
from foveate.errors import CheckpointError, DataError

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON object to this file.")]


def bench(
    name: Annotated[str, typer.Argument(help="The benchmark: kernels, switch, load, decode, saved, runtime or serve.")],
    out: Out = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Of runtime: how long the live loop runs; 0 leaves it out.")
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="Of runtime: an earlier result whose costs are taken, not measured anew.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Run a benchmark and print its figures; with --json also the machine and the raw rounds."""
    from foveate import bench as benchmarks

    check_folder_of(out)
    if name != "runtime" and (minutes is not None or costs is not None):
        raise DataError(f"--minutes and --costs are of the benchmark runtime, not of {name}")
    sizes = None
    if name == "runtime":
        from foveate.bench.runtime import Sizes

        sizes = Sizes(costs_file=costs) if minutes is None else Sizes(costs_file=costs, minutes=minutes)
    show_result(benchmarks.run(name, sizes), out, json_output)


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
