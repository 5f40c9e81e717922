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


#: The options that only some benchmarks have.
_OWN = {
    "model": ("calibrate", "trace"),
    "data": ("calibrate",),
    "windows": ("calibrate",),
    "minutes": ("runtime", "trace"),
    "costs": ("runtime",),
}


def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="kernels, switch, load, decode, calibrate, saved, runtime, memory, serve, inputs, importance or trace."
        ),
    ],
    out: Out = None,
    model: Annotated[
        str | None, typer.Option(help="calibrate, trace: a model's folder. Default: one of the benchmark's.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="calibrate: a text file. Default: random tokens.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="calibrate: windows of 512 tokens. Default: as many as it needs.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="runtime: how long the live loop runs, 0 leaves it out; trace: what the hour takes."
        ),
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="runtime: an earlier result whose costs are taken, not measured anew.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Run a benchmark and print its figures; with --json also the machine and the raw rounds."""
    from foveate import bench as benchmarks

    check_folder_of(out)
    given = {"model": model, "data": data, "windows": windows, "minutes": minutes, "costs": costs}
    for option, value in given.items():
        if value is not None and name not in _OWN[option]:
            raise DataError(f"--{option} is for the benchmark {' or '.join(_OWN[option])}, not for {name}")
    sizes: Any = None
    if name == "runtime":
        from foveate.bench.runtime import Sizes

        sizes = Sizes(costs_file=costs) if minutes is None else Sizes(costs_file=costs, minutes=minutes)
    elif name == "calibrate":
        from foveate.bench.calibrate import Calibrated

        sizes = Calibrated(model=model, data=None if data is None else str(data), windows=windows)
    elif name == "trace":
        from foveate.bench.trace import Sizes as TraceSizes

        sizes = TraceSizes(model=model) if minutes is None else TraceSizes(model=model, minutes=minutes)
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
