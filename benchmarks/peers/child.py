"""A script in a process of another environment. Requests and answers are lines of JSON (`scripts/answers.py`).

A child process keeps what it has loaded until it is closed, so that its work and ours can take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from foveate.errors import FoveateError

SCRIPTS = Path(__file__).parent / "scripts"
LIMIT_S = 1800.0


class PeerError(FoveateError):
    """A peer ended, did not answer in time, or gave an answer of another kind than was asked for."""


class Child:
    """A running script.

    Args:
        name: the name of the peer, for messages.
        python: the interpreter that runs it.
        script: the file that it runs.
        limit: the seconds that an answer may take.

    Raises:
        PeerError: there is no such interpreter.
    """

    def __init__(self, name: str, python: Path, script: Path, limit: float = LIMIT_S) -> None:
        self.name, self.limit = name, limit
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as long as the process)
        try:
            self._process = subprocess.Popen(
                [str(python), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=_environment(python),
            )
        except OSError as error:
            self._said.close()
            raise PeerError(f"{name} could not be started: {error}") from error

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            PeerError: the process ended (the message has its last line on stderr), was too slow, or did not answer in
                JSON.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            self._process.kill()

        timer = threading.Timer(self.limit, give_up)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if timed_out.is_set():
            raise PeerError(f"{self.name} did not answer {do!r} within {self.limit:g} s")
        if not line:
            raise PeerError(f"{self.name} ended with {self._process.wait()} on {do!r}: {self._last_line()}")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise PeerError(f"{self.name} answered {do!r} with {line.strip()[:80]!r}, not with a JSON object")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(ValueError):  # the process is closed already
            self._process.communicate()
        self._said.close()

    def _last_line(self) -> str:
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else "nothing on stderr"

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _environment(python: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {
        "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")]),  # tools that its packages bring
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large blocks on huge pages, as ours are
    }
