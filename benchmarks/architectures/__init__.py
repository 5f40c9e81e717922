"""The table of architectures: which families of models foveate supports, which only partly, and which it refuses.

Each family is a tiny model of random weights. Families are tried in another process, one after the other. So a family
that crashes its process, or never answers, becomes a line of the table and does not stop the others. `page` writes the
table as docs/architectures.md has it.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.architectures.families import TRANSFORMERS, Family
from benchmarks.architectures.layers import LAYERS
from benchmarks.architectures.trial import Outcome, attempt
from foveate.bench.shared.extras import require
from foveate.bench.shared.result import Measured
from foveate.errors import FoveateError
from foveate.kernels.backends.table import ensure_loaded
from foveate.progress import track

FAMILIES = (*TRANSFORMERS, *LAYERS)
STATUSES = ("works", "partly", "refused", "FAILED", "not tried")
#: Seconds after which a family counts as failed.
_PATIENCE = 300


def measure(only: Sequence[str] = (), progress: bool = True) -> Measured:
    """Try every family, or those named.

    Args:
        only: names of families, such as `"Llama"`.
        progress: whether to show a progress bar.

    Raises:
        FoveateError: there is no family of that name.
    """
    unknown = set(only) - {family.name for family in FAMILIES}
    if unknown:
        raise FoveateError(f"families (={', '.join(sorted(unknown))}) are not in the table of architectures")
    require("transformers")
    ensure_loaded()
    chosen = [family for family in FAMILIES if not only or family.name in only]
    worker = _Worker()
    try:
        outcomes = [worker.attempt(family) for family in track(chosen, "trying", show=progress)]
    finally:
        worker.stop()
    counts = Counter(outcome.status for outcome in outcomes)
    rounds = [
        {**asdict(outcome), "errors": {str(level): e for level, e in outcome.errors.items()}} for outcome in outcomes
    ]
    notes = ("tiny models of random weights, calibrated on two batches; errors are of outputs, relative to their size",)
    return Measured({status: counts[status] for status in STATUSES}, rounds, notes)


class _Worker:
    """A process that tries one family after another. If a family ends the process, the next one gets a new process."""

    def __init__(self) -> None:
        self._process: Any = None

    def attempt(self, family: Family) -> Outcome:
        """The outcome of trying a family in that process."""
        if self._process is None:
            self._start()
        try:
            self._ours.send(family.name)  # by name, because the functions of a family cannot be pickled
            if self._ours.poll(_PATIENCE):
                answer: Outcome = self._ours.recv()
                return answer
            says = f"no answer within {_PATIENCE} seconds"
        except (EOFError, ConnectionError):
            self._process.join()
            says = f"the process ended with code {self._process.exitcode}"
        self.stop()
        return Outcome(name=family.name, kind=family.kind, status="FAILED", step="", says=says, errors={})

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._ours.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def _work(asked: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        name = asked.recv()
        asked.send(attempt(next(family for family in FAMILIES if family.name == name)))


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown, from the object of the benchmark."""
    rounds: list[dict[str, Any]] = result["rounds"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("foveate", "torch", "transformers"))
    counts = ", ".join(f"{int(result['figures'][status])} {status}" for status in STATUSES)
    lines = [
        "# Architectures that were tried",
        "",
        "Made by `python -m benchmarks architectures --table docs/architectures.md`, which takes some minutes.",
        f"{result['date'][:10]}, {versions}:",
        f"{len(rounds)} families, {counts}.",
        "",
        "Each family is a tiny model of random weights (two layers of width 32). It is quantized on two batches, run",
        "at 8, 6, 4, 3 and 2 bits, saved, loaded, asked to write four tokens where it writes text, and made plain.",
        "The last two columns are the relative error of its output at 8 and at 4 bits, inputs at 16: they show that",
        "nothing is broken, not what a trained model loses.",
        "",
        "- **works**: every weight matrix is on planes.",
        "- **partly**: some stay float; the share is of all values in weights of two dimensions or more.",
        "- **refused**: at the step and in the sentence given. **FAILED**: a fault of foveate's.",
        "- **not tried**: the float model could not be made or run.",
    ]
    for kind in dict.fromkeys(r["kind"] for r in rounds):
        lines += [
            "",
            f"## {kind}",
            "",
            "| family | outcome | float | what | 8 bits | 4 bits |",
            "|---|---|---|---|---|---|",
        ]
        for r in (r for r in rounds if r["kind"] == kind):
            share = f"{r['float_share']:.1%}".replace("%", " %") if r["status"] == "partly" else ""
            errors = [f"{r['errors'][level]:.2g}" if level in r["errors"] else "" for level in ("8", "4")]
            what = r["says"].replace("|", "\\|")
            lines.append(f"| {r['name']} | {r['status']} | {share} | {what} | {errors[0]} | {errors[1]} |")
    return "\n".join(lines) + "\n"
