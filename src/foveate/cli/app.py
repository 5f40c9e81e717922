"""The Typer application: all commands, and the one place that turns an error into a line on stderr and an exit code."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import foveate
from foveate.cli import allocate, audit, bench, evaluate, generate, inspect, quantize, report, serve, serve_demo, top
from foveate.cli.shared.options import Json
from foveate.errors import FoveateError
from foveate.version import __version__

#: The base of what typer raises for a wrong option or argument; typer does not export the class by name.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
_PACKAGE = Path(foveate.__file__).parent
_DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class Commands(TyperGroup):
    """The group of commands, which answers an error with an exit code and one line instead of a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command, print an error in one line, and exit."""
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except _ClickException as error:
            code = _print_error(getattr(error, "format_message", error.__str__)())
        except (FoveateError, OSError) as error:
            code = _print_error(str(error) or type(error).__name__)
        sys.exit(code if isinstance(code, int) else 0)


def _print_error(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _StderrHandler(logging.Handler):
    """A log handler that prints the bare message on the stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


app = typer.Typer(
    name="foveate",
    cls=Commands,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Adaptive precision for PyTorch: a model is stored once as bit planes and read at any precision.",
)


@app.callback()
def _prepare(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors on stderr.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    log_to_stderr(logging.WARNING if quiet else logging.INFO)
    if context.invoked_subcommand is None:
        print(context.get_help())


def log_to_stderr(level: int) -> None:
    """Print the package's log messages of at least `level`, and its warnings, on stderr, one line each."""
    log = logging.getLogger("foveate")
    log.handlers[:] = [_StderrHandler()]
    log.setLevel(level)
    warnings.showwarning = _warn


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """Print a warning of foveate in one line, without its line of code.

    Warnings of other libraries, and deprecations, are for developers: `python -W default -m foveate` shows them.
    """
    is_own = Path(filename).is_relative_to(_PACKAGE) and not issubclass(category, _DEPRECATIONS)
    if is_own or sys.warnoptions:
        print(f"warning: {message}", file=sys.stderr)


app.command("quantize")(quantize.quantize)
app.command("allocate")(allocate.allocate)
app.command("inspect")(inspect.inspect)
app.command("eval")(evaluate.evaluate)
app.command("audit")(audit.audit)
app.command("generate")(generate.generate)
app.command("report")(report.report)
app.command("serve")(serve.serve)
app.command("serve-demo")(serve_demo.serve_demo)
app.command("top")(top.top)
app.command("bench")(bench.bench)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the model and the report into.")] = Path(
        "foveate-demo"
    ),
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the trained model for the next run.")] = None,
    json_output: Json = False,
) -> None:
    """Show all of foveate in three minutes: train a small model, quantize it, and switch its precision as it writes."""
    from foveate.cli.demo import run

    run(out=out, cache=cache, json_output=json_output)
