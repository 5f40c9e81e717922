"""The command `foveate`: quantize, allocate, inspect, eval, generate, report, demo, bench.

Results on stdout, everything else on stderr. Exit code 0: done; 1: `--check` found a map worse than uniform precision;
2: bad input, with one line that says what is wrong; 130: interrupted.
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
