"""Start a fresh process and read its answer; and the peak memory of the process that calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import foveate
from foveate.errors import FoveateError


def run_in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module of foveate in a fresh Python; the last line that it prints is its answer, a JSON object.

    Raises:
        FoveateError: the process failed; the message has the last line of its stderr.
    """
    source = str(Path(foveate.__file__).parent.parent)
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise FoveateError(f"{module}, run in a fresh process, ended with {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_memory() -> int:
    """The highest resident size of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(v for v in status.read_text().splitlines() if v.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def reset_peak_memory() -> bool:
    """Reset the highest resident size to the present one; returns whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
