"""Whether training with compressed activations ends where plain training ends, and how much memory it saves.

For each seed the same training is run plainly and compressed, with the same start, order, crops and dropout. The losses
on held-out data are compared pair by pair, because differences between seeds are far larger than the gap in question.
The gap counts as negligible if the 95 % interval of the mean difference (t distribution) lies within +-0.5 % of the
loss. Error targets are tried from the largest down, as a user would. The first one whose gap is negligible is reported
for the model; all targets that were tried are in the rounds.

Saved bytes are those of the last step: the storages that autograd would hold, without parameters, over what the store
holds. Peak bytes are of one whole step, with parameters, gradients and the optimizer's state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.training.tasks import Task
from foveate.activations.compress import compress_activations
from foveate.activations.memory.peak import PeakTracker
from foveate.activations.policy.options import ActivationOptions
from foveate.activations.store import ActivationStore
from foveate.bench.shared.extras import require
from foveate.bench.shared.result import Measured
from foveate.collect.evaluation import evaluating
from foveate.progress import log

#: Error targets from the largest down.
TARGETS = (0.5, 0.3, 0.1)
#: The gap that may not be exceeded, as a share of the loss.
GAP = 0.005


@dataclass(frozen=True)
class Interval:
    """The 95 % interval of a mean of paired differences."""

    mean: float
    low: float
    high: float

    @property
    def negligible(self) -> bool:
        """Whether the whole interval is within +-`GAP`."""
        return self.low >= -GAP and self.high <= GAP


def paired(plain: Sequence[float], other: Sequence[float]) -> Interval:
    """The interval of (other - plain) over the mean of plain, from runs of the same seeds."""
    stats = require("scipy.stats")
    scale = sum(plain) / len(plain)
    differences = [(b - a) / scale for a, b in zip(plain, other, strict=True)]
    mean = sum(differences) / len(differences)
    if len(differences) < 2:
        return Interval(mean, -math.inf, math.inf)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1))
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * deviation / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)


def train_step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """Forward, backward, clipping and the optimizer."""
    optimizer.zero_grad()
    task.loss(model, batch).backward()
    if task.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
    optimizer.step()


def peak_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, step: Callable[[], None]) -> int:
    """The peak bytes of all tensors alive during a step."""
    optimizer.zero_grad()
    held = [leaf for leaf in tree_leaves((list(optimizer.state.values()), batch)) if isinstance(leaf, Tensor)]
    with PeakTracker([*model.parameters(), *model.buffers(), *held]) as tracker:
        step()
    return int(tracker.timeline().peak({}))


def _run(task: Task, seed: int, error: float | None) -> dict[str, Any]:
    """Train once; plainly if there is no error target."""
    torch.manual_seed(seed)
    model = task.build(seed)
    optimizer, batches = task.optimizer(model), task.batches(seed)
    schedule = task.schedule(optimizer, task.steps)
    torch.manual_seed(seed)  # of dropout
    store: ActivationStore | None = None
    if error is not None:
        store = compress_activations(model, error=error, options=ActivationOptions(seed=seed))
    started = time.process_time()
    with store or nullcontext():
        for _ in range(task.steps):
            train_step(task, model, optimizer, next(batches))
            schedule.step()
    seconds = time.process_time() - started
    with evaluating(model), torch.no_grad():
        loss = task.held_out(model)
    row = {"part": "training", "model": task.name, "seed": seed, "error": error, "loss": loss, "cpu_seconds": seconds}
    if store is not None:
        row |= _saved(store)
    if seed == 0:
        row["peak"] = _peak(task, model, optimizer, next(batches), store)
    return row


def _saved(store: ActivationStore) -> dict[str, Any]:
    assert store.latest is not None
    audits = [(predicted, audited) for _, predicted, audited in store.audits]
    return {
        "original": store.latest.original,
        "held": store.latest.held,
        "saved_ratio": store.latest.original / store.latest.held,
        "audits": audits,
    }


def _peak(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, store: ActivationStore | None
) -> int:
    """The peak bytes of an ordinary step, one that measures nothing."""
    with store or nullcontext():
        while True:
            bytes = peak_of(model, optimizer, batch, lambda: train_step(task, model, optimizer, batch))
            step = None if store is None else store.latest
            if step is None or not (step.profiled or step.audited or step.probed):
                return bytes


def measure_training(tasks: Iterable[Task], targets: Sequence[float] = TARGETS) -> Measured:
    """Train every task with its seeds, plainly and at the largest error target whose gap is negligible."""
    rounds: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    notes: list[str] = []
    for task in tasks:
        plain = [_run(task, seed, None) for seed in range(task.seeds)]
        rounds += plain
        losses = [row["loss"] for row in plain]
        for error in targets:
            ours = [_run(task, seed, error) for seed in range(task.seeds)]
            gap = paired(losses, [row["loss"] for row in ours])
            rounds += [row | {"gap_low": gap.low, "gap_high": gap.high} for row in ours]
            log.info("%s at %g: gap %+.4f to %+.4f", task.name, error, gap.low, gap.high)
            if gap.negligible:
                break
        ratio = math.exp(sum(math.log(row["saved_ratio"]) for row in ours) / task.seeds)
        name = task.name.rstrip("0123456789")
        figures |= {
            f"error_{name}": error,
            f"loss_{name}": sum(losses) / task.seeds,
            f"gap_low_{name}": gap.low,
            f"gap_high_{name}": gap.high,
            f"loss_gap_within_{name}": float(gap.negligible),
            f"saved_ratio_{name}": ratio,
            f"peak_ratio_{name}": plain[0]["peak"] / ours[0]["peak"],
        }
        notes.append(
            f"{task.name}: from {task.start}, {task.steps} steps, {task.seeds} seeds; plain loss "
            f"{min(losses):.4f} to {max(losses):.4f}"
        )
    return Measured(figures | _overall(figures), rounds, notes)


def _overall(figures: dict[str, float]) -> dict[str, float]:
    """Geometric means of ratios over models, and whether every gap is negligible."""
    result: dict[str, float] = {}
    for name in ("saved_ratio", "peak_ratio"):
        logs = [math.log(value) for key, value in figures.items() if key.startswith(f"{name}_")]
        if logs:
            result[name] = math.exp(sum(logs) / len(logs))
    within = [value for key, value in figures.items() if key.startswith("loss_gap_within_")]
    if within:
        result["loss_gap_within"] = min(within)
    return result
