"""The manager around a plain loop, while a second process takes the CPUs and memory and gives them back.

The loop runs the small model on held-out windows, one after another. The first quarter of the time is quiet, then the
second process runs for half of it, and the last quarter is quiet again. The limit is on the seconds of a pass: a little
more than a quiet pass takes at index 0. The true KL of passes is measured beside what the log's indices predict.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
import torch

import foveate as fv
from foveate.bench.simulation.costs import Subject, kl_of
from foveate.runtime import Costs, ManagerOptions, Policy, RuntimeManager, replay

#: The limit over the time of a quiet pass at index 0.
_OVER_QUIET = 1.25
#: Bytes that the second process takes.
_BYTES = 512 << 20
#: One pass of so many is compared with the reference.
_CHECK_EVERY = 5


@dataclass(frozen=True, kw_only=True)
class Live:
    """What came of the loop.

    Attributes:
        figures: name -> number.
        rounds: a dictionary for each second.
        notes: sentences for a reader of the figures.
    """

    figures: dict[str, float]
    rounds: list[dict[str, Any]]
    notes: tuple[str, ...]


def pass_seconds(found: Subject, rounds: int = 3) -> tuple[float, ...]:
    """Seconds of one window at each index; the least of several, interleaved."""
    best = [math.inf] * len(found.frontier)
    with torch.inference_mode():
        for _, (index, plan) in itertools.product(range(rounds), enumerate(found.frontier)):
            fv.apply(found.model, plan)
            started = time.perf_counter()
            found.model(input_ids=found.held_out[:1])
            best[index] = min(best[index], time.perf_counter() - started)
    fv.apply(found.model, found.frontier[0])
    # where noise says that a better map is faster, both have the greater time
    return tuple(reversed(list(itertools.accumulate(reversed(best), max))))


@contextmanager
def second_process(processes: int, size: int) -> Iterator[None]:
    """A process that takes so many CPUs and so many bytes, for the length of a block."""
    command = [sys.executable, "-m", "foveate.bench.fresh_process.hog", str(processes), str(size)]
    source = str(Path(fv.__file__).parent.parent)
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    hog = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert hog.stdin is not None
    assert hog.stdout is not None
    try:
        hog.stdout.readline()
        yield
    finally:
        hog.stdin.close()
        hog.wait()
        hog.stdout.close()


def run_live(found: Subject, minutes: float) -> Live:
    """Run the loop.

    Args:
        found: the small model with its frontier and measured KL.
        minutes: how long.
    """
    costs = Costs(kl=found.kl, seconds_per_token=pass_seconds(found))
    limit = _OVER_QUIET * costs.seconds_per_token[0]
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    quarter = 15.0 * minutes
    passes: list[tuple[float, float, int, float]] = []
    memory = psutil.virtual_memory().available
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run.jsonl"
        options = ManagerOptions(costs=costs, log=log, policy=Policy(), status=False)
        with RuntimeManager(
            found.model, limits=fv.Limits(latency=limit), frontier=found.frontier, options=options
        ) as manager:
            started = time.monotonic()
            _loop(found, manager, started, started + quarter, passes)
            with second_process(processes, min(_BYTES, memory // 4)):
                _loop(found, manager, started, started + 3 * quarter, passes)
            _loop(found, manager, started, started + 4 * quarter, passes)
            ended = manager.index
            expected = manager.expected_kl
            moves = [(move.at - started, move.decision.before, move.decision.index) for move in manager.moves]
        decisions = len(replay(log))
    return _summary(passes, moves, limit, quarter, {"ended": ended, "expected": expected, "decisions": decisions})


def _loop(
    found: Subject, manager: RuntimeManager, started: float, until: float, passes: list[tuple[float, float, int, float]]
) -> None:
    """Run windows until a time; of each the time, the seconds, the index and the KL (NaN where not measured)."""
    windows = itertools.cycle(zip(found.held_out, found.reference, strict=True))
    with torch.inference_mode():
        while time.monotonic() < until:
            ids, reference = next(windows)
            index, begun = manager.index, time.monotonic()
            logits = found.model(input_ids=ids[None]).logits
            seconds = time.monotonic() - begun
            kl = kl_of(logits, reference) if len(passes) % _CHECK_EVERY == 0 else math.nan
            passes.append((begun - started, seconds, index, kl))


def _summary(
    passes: list[tuple[float, float, int, float]],
    moves: list[tuple[float, int, int]],
    limit: float,
    quarter: float,
    ended: dict[str, float],
) -> Live:
    pressed = [p for p in passes if quarter + 2.0 <= p[0] < 3 * quarter]
    quiet = [p for p in passes if p[0] < quarter]
    measured = [p[3] for p in passes if not math.isnan(p[3])]
    back = [at for at, _, index in moves if index == 0 and at > 3 * quarter]
    figures = {
        "live_latency_over_limit": median(p[1] for p in pressed) / limit if pressed else math.nan,
        "live_mean_latency_over_limit": fmean(p[1] for p in pressed) / limit if pressed else math.nan,
        "live_quiet_latency_over_limit": median(p[1] for p in quiet) / limit if quiet else math.nan,
        "live_mean_index_pressed": fmean(p[2] for p in pressed) if pressed else math.nan,
        "live_returned": float(ended["ended"] == 0),
        "live_seconds_to_return": back[-1] - 3 * quarter if back else math.nan,
        "live_kl_over_predicted": fmean(measured) / ended["expected"] if measured and ended["expected"] else math.nan,
        "live_moves": float(len(moves)),
        "live_decisions_replayed": float(ended["decisions"]),
    }
    rounds = [
        {"second": second, "median_ms": 1e3 * median(p[1] for p in group), "index": group[-1][2], "passes": len(group)}
        for second, each in itertools.groupby(passes, key=lambda p: int(p[0]))
        if (group := list(each))
    ]
    notes = (
        f"live: a pass is limited to {1e3 * limit:.1f} ms, {_OVER_QUIET} of a quiet pass at index 0; the second "
        "process runs in the middle half",
        "live: memory is taken and given back, and no limit of it is set, for no move frees memory here",
    )
    return Live(figures=figures, rounds=rounds, notes=notes)
