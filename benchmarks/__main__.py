"""The developers' benchmarks as commands: `python -m benchmarks NAME --out FILE`. `--help` lists the names."""

from __future__ import annotations

import ast
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import MODULES, run
from benchmarks.peers.equal_quality.plot import quality_plot
from benchmarks.peers.speed.plot import speed_plot
from foveate.cli.app import Commands, log_to_stderr
from foveate.cli.bench import Out, check_folder_of, show_result
from foveate.cli.shared.options import Json

app = typer.Typer(
    name="python -m benchmarks",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Every benchmark: those that are installed with foveate, and those that only developers run.",
)
#: These benchmarks have further options, so each has a command of its own below.
_WITH_OPTIONS = ("activations", "architectures", "equal_quality", "inputs", "peers", "quantizing_peers")


@app.callback()
def _prepare() -> None:
    log_to_stderr(logging.INFO)


def _headline(module: str) -> str:
    """The first line of a module's docstring, without importing what it needs."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    head = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return head.partition("\n")[0]


def _register(name: str) -> None:
    @app.command(name, help=_headline(MODULES[name]))
    def _(out: Out = None, json_output: Json = False) -> None:
        check_folder_of(out)
        show_result(run(name), out, json_output)


for _name in MODULES:
    if _name not in _WITH_OPTIONS:
        _register(_name)


@app.command(help=_headline(MODULES["activations"]))
def activations(
    out: Out = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="training, bounds, budgets or times; repeatable. Default: all."),
    ] = None,
    share: Annotated[float | None, typer.Option(help="The share of the steps and data to run, 0 to 1.")] = None,
    json_output: Json = False,
) -> None:
    """Run all parts of the benchmark, or the named ones."""
    check_folder_of(out)
    options = {**({"parts": part} if part else {}), **({"share": share} if share is not None else {})}
    show_result(run("activations", **options), out, json_output)


@app.command(help=_headline(MODULES["architectures"]))
def architectures(
    out: Out = None,
    table: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
    json_output: Json = False,
) -> None:
    """Try every family, and write the outcomes as JSON and as a table."""
    for file in (out, table):
        check_folder_of(file)
    result = run("architectures")
    if table is not None:
        from benchmarks.architectures import page

        table.write_text(page(result), encoding="utf-8")
    show_result(result, out, json_output)


@app.command(help=_headline(MODULES["inputs"]))
def inputs(
    out: Out = None,
    switch: Annotated[
        list[str] | None,
        typer.Option(
            help="One of feedback, grouped, static-scales, zero-point, inputs-16, bytes and seconds, alone; repeatable."
        ),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="stories260k, babyllama105 or lm; repeatable. Default: all.")
    ] = None,
    bits: Annotated[list[float] | None, typer.Option(help="Average bits; repeatable. Default: 3.25, 4 and 5.")] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="The share of the data to run, 0 to 1.")] = 1.0,
    json_output: Json = False,
) -> None:
    """Measure plain choosing, or the named enhancements beside it."""
    check_folder_of(out)
    chosen = {"switches": switch or (), "models": model or (), "bits": bits or ()}
    show_result(run("inputs", share=share, **chosen), out, json_output)


@app.command(help=_headline(MODULES["peers"]))
def peers(
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw time against bits into this SVG file.")] = None,
    json_output: Json = False,
) -> None:
    """Run the benchmark, and write its plot to the file `plot` if one is given."""
    check_folder_of(out)
    check_folder_of(plot)
    result = run("peers")
    if plot is not None:
        plot.write_text(speed_plot(result["rounds"]), encoding="utf-8")
    show_result(result, out, json_output)


@app.command("equal_quality", help=_headline(MODULES["equal_quality"]))
def equal_quality(
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw speed against KL into this SVG file.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where models are kept between runs. Default: bench-out/equal_quality.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=0, help="Rounds of times; 0 measures quality only.")] = None,
    importance: Annotated[bool, typer.Option(help="Give llama.cpp an importance matrix.")] = True,
    compiled: Annotated[
        bool | None,
        typer.Option(help="Compile our pass of a token, or do not. Default: only where blocks are not one op."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Run the benchmark, and write its plot to the file `plot` if one is given."""
    check_folder_of(out)
    check_folder_of(plot)
    given = {"work": work, "rounds": rounds, "compiled": compiled}
    result = run(
        "equal_quality", importance=importance, **{name: value for name, value in given.items() if value is not None}
    )
    if plot is not None:
        plot.write_text(quality_plot(result["rounds"]), encoding="utf-8")
    show_result(result, out, json_output)


@app.command("quantizing_peers", help=_headline(MODULES["quantizing_peers"]))
def quantizing_peers(
    out: Out = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="gptqmodel, auto_round or llama_cpp; repeatable. Default: all.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Calibration windows of every side, for a short sample. Default: its own.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where the model is kept between runs. Default: bench-out/equal_quality.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Measure ours, and all peers or the named ones."""
    check_folder_of(out)
    given = {"peers": peer or (), "windows": windows, "work": work}
    result = run("quantizing_peers", **{name: value for name, value in given.items() if value is not None})
    show_result(result, out, json_output)


if __name__ == "__main__":
    app()
