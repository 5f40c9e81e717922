"""The command `foveate`: quantize, allocate, inspect, eval, audit, generate, top, report, bench, demo.

Results go to stdout and everything else to stderr. The exit codes are

    0    the work is done
    1    `--check` found a map that is worse than uniform precision, or that exceeds its loss limit
    2    the input is wrong; one line on stderr says what is wrong
    130  the user interrupted the command
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the command."""
    try:
        from foveate.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f'error: the command needs {error.name}: pip install "foveate[cli]"', file=sys.stderr)
        sys.exit(2)
    app()
