"""Random calls of every op under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/fuzz/ops.py 50000 --seed 0

The calls run in a process of their own, which is started again behind a call that it dies of. Prints the number of
calls and every finding (a report of a sanitizer, a crash, a call that does not end, an error that is none of an op's);
exits with 1 if there is any, and with 2 where code cannot be compiled with sanitizers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the calls are made of is shared with the tests

from fuzz import sanitized

#: One call that takes longer does not end.
MOST_S = 60.0
_ISAS = ("portable", "avx2", "avx512_vnni")


def _child(first: int, end: int, seed: int, progress: Path) -> None:
    """Make the calls, and write each one's number down before it is made."""
    sanitized.load()
    import torch

    from fuzz.op_calls import op_call, run

    isas = []
    for isa in _ISAS:
        try:
            torch.ops.foveate._cpu_isa(isa)
            isas.append(isa)
        except RuntimeError:  # not of this machine
            continue
    refused = 0
    with progress.open("r+b", buffering=0) as file:
        for number in range(first, end):
            file.seek(0)
            file.write(f"{number:20} {refused:20}".encode())
            torch.ops.foveate._cpu_isa(isas[number % len(isas)])
            torch.set_num_threads(1 + number % 2)
            refused += not run(op_call(seed, number))
        file.seek(0)
        file.write(f"{end:20} {refused:20}".encode())


def _described(seed: int, number: int) -> str:
    return f"call {number} of seed {seed}"


def _report(error: str) -> str:
    """The part of a process's stderr that says what was found."""
    lines = error.splitlines()
    start = next((i for i, line in enumerate(lines) if "ERROR: " in line or "runtime error" in line), -12)
    return "\n".join(f"    {line}" for line in lines[start:][:24])


def fuzz(calls: int, seed: int, first: int = 0, minutes: float = 60.0) -> list[str]:
    """Make so many calls, or as many as the time allows; what was found, a text each."""
    findings: list[str] = []
    refused = 0
    started = time.monotonic()
    environment = sanitized.environment()
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        end, now = first + calls, first
        while now < end:
            progress.write_bytes(b" " * 41)
            command = [sys.executable, __file__, str(end), f"--seed={seed}", f"--first={now}", f"--child={progress}"]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            error = _watched(process, progress, started + 60.0 * minutes)
            reached, more = (int(n) for n in (progress.read_text().split() or (now, 0)))
            refused += more
            if error is None:
                print(f"{minutes:g} minutes are over")
                calls = reached - first
                break
            if process.returncode == 0 and reached == end:
                break
            findings.append(f"{_described(seed, reached)} ended the process ({process.returncode}):\n{_report(error)}")
            print(findings[-1], flush=True)
            now = reached + 1
    took = time.monotonic() - started
    print(
        f"{calls} calls of ops under ASan and UBSan in {took:.0f} s, {refused} of them refused: {len(findings)} found"
    )
    return findings


def _watched(process: subprocess.Popen[str], progress: Path, until: float) -> str | None:
    """Wait for a process, and end it where one call does not end; its stderr, or None if its time was over."""
    seen, since = b"", time.monotonic()
    while True:
        try:
            return process.communicate(timeout=5.0)[1]
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                process.kill()
                process.communicate()
                return None
            now = progress.read_bytes()
            if now != seen or not now.strip():
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > MOST_S:
                process.kill()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Random calls of every op under sanitizers.")
    parser.add_argument("calls", type=int, nargs="?", default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--first", type=int, default=0, help="the number of the first call, to make one again")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        _child(chosen.first, chosen.calls, chosen.seed, chosen.child)
        return 0
    try:
        print("building the kernels with sanitizers, which takes some minutes the first time", flush=True)
        sanitized.library()
    except sanitized.NoSanitizers as error:
        print(f"no sanitizers here: {error}", file=sys.stderr)
        return 2
    return 1 if fuzz(chosen.calls, chosen.seed, chosen.first, chosen.minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
