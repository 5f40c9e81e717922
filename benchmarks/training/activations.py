"""Compressed activations in real training: what they save, what that costs, and whether the bound holds.

There are four parts, and each can be run by itself:

    training  the same training plainly and compressed: held-out loss, saved bytes, peak  (paired.py)
    bounds    the true error of the gradient against the stated one                        (bounds.py)
    budgets   the peaks that were asked for, and the peaks that were measured              (budgets.py)
    times     a step against a plain one, and against recomputation at equal memory        (times.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.models.cases import VARIABLE, data_folder
from benchmarks.training.bounds import STEPS, measure_bounds
from benchmarks.training.budgets import measure_budgets
from benchmarks.training.paired import measure_training
from benchmarks.training.tasks import tasks
from benchmarks.training.times import Sizes, measure_times
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.errors import BudgetError, FoveateError

PARTS = ("training", "bounds", "budgets", "times")
#: Those that need the data folder.
_OF_TASKS = PARTS[:-1]


def measure(parts: Sequence[str] = PARTS, share: float = 1.0) -> Measured:
    """Run some parts, or all.

    Args:
        parts: of `PARTS`.
        share: the share of the steps and the data, for a quick look; figures below 1 mean nothing.

    Raises:
        FoveateError: there is no such part.
        BudgetError: `share` is not in 0..1.
        MissingExtraError: transformers, scipy or the package of MiniLM is not installed.
    """
    for part in parts:
        if part not in PARTS:
            raise FoveateError(f"part (={part!r}) is not one of {', '.join(PARTS)}")
    if not 0 < share <= 1:
        raise BudgetError(f"share (={share}) must be above 0 and at most 1")
    folder = data_folder()
    results: list[Measured] = []
    skipped = [part for part in parts if part in _OF_TASKS and folder is None]
    if skipped:
        note = f"{', '.join(skipped)} skipped: {VARIABLE} is not set, and it names the folder with the data"
        results.append(Measured({}, (), (note,)))
    with BackgroundLoad() as background:
        if folder is not None and "training" in parts:
            results.append(measure_training(tasks(folder, share)))
        if folder is not None and "bounds" in parts:
            results.append(measure_bounds(tasks(folder, share), steps=max(12, round(STEPS * share))))
        if folder is not None and "budgets" in parts:
            results.append(measure_budgets(tasks(folder, share)))
        if "times" in parts:
            sizes = Sizes()
            few = replace(
                sizes, tokens=max(32, round(sizes.tokens * share)), rounds=max(2, round(sizes.rounds * share))
            )
            results.append(measure_times(few))
    return _joined(results, background.note(), share)


def _joined(results: Sequence[Measured], machine: str, share: float) -> Measured:
    notes = [note for measured in results for note in measured.notes]
    notes += [machine, *([f"only a share of {share:g} of the steps and the data"] if share < 1 else [])]
    return Measured(
        {name: value for measured in results for name, value in measured.figures.items()},
        [row for measured in results for row in measured.rounds],
        notes,
    )
