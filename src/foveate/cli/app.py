"""The commands put together, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import foveate
from foveate.cli import allocate, audit, bench, evaluate, generate, inspect, quantize, report
from foveate.cli.shared.options import Json
from foveate.errors import FoveateError
from foveate.version import __version__

#: What typer raises for an option or an argument that is wrong; typer does not export it by name.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


_PACKAGE = Path(foveate.__file__).parent
_DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class Commands(TyperGroup):
    """The group of commands, with foveate's exit codes in place of tracebacks."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, say what is wrong in one line, and exit."""
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except _ClickException as error:
            code = _refuse(getattr(error, "format_message", error.__str__)())
        except (FoveateError, OSError) as error:
            code = _refuse(str(error) or type(error).__name__)
        sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class _ToStderr(logging.Handler):
    """Log lines as they are, on whatever stderr is at the time."""

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
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but warnings and errors.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    speak_on_stderr(logging.WARNING if quiet else logging.INFO)
    if context.invoked_subcommand is None:
        print(context.get_help())


def speak_on_stderr(level: int) -> None:
    """Send the package's log lines from `level` up, and all warnings, to stderr, a line each."""
    log = logging.getLogger("foveate")
    log.handlers[:] = [_ToStderr()]
    log.setLevel(level)
    warnings.showwarning = _warn


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """A warning of foveate's as one line, without the line of code it comes from.

    What other libraries say, and what will change in them one day, is for developers: `python -W default -m foveate`.
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
app.command("bench")(bench.bench)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model and the report.")] = Path(
        "foveate-demo"
    ),
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the trained model for the next time.")] = None,
    json_output: Json = False,
) -> None:
    """All of foveate in three minutes: train a small model, quantize it, and change its precision as it writes."""
    from foveate.cli.demo import run

    run(out=out, cache=cache, json_output=json_output)
