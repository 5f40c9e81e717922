"""The time of a step with compressed activations, beside plain training and beside recomputation.

A Llama of width 512 takes whole steps (forward, backward, AdamW) in rounds: plain, compressed, and with
`torch.utils.checkpoint` (not reentrant) around its layers, one after the other in each round. Recomputation gets as
much memory as compression takes: the first n layers are checkpointed, with the smallest n whose peak is no higher, or
all layers if no n suffices.

`step_time_ratio` is of ordinary steps, which measure nothing. `step_time_ratio_amortised` counts profiles and audits at
their default cadence too, one step in `EVERY` that does both. `vs_checkpoint` is the time of compressed steps over that
of checkpointed steps, and `vs_checkpoint_amortised` is the same with profiles and audits. The peaks of all three are
figures too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.training.paired import peak_of
from benchmarks.training.tasks import byte_llama, next_byte
from foveate.activations.compress import compress_activations
from foveate.activations.policy.options import ActivationOptions
from foveate.activations.store import ActivationStore
from foveate.bench.shared.result import BackgroundLoad, Measured
from foveate.kernels.threads import threads
from foveate.progress import log

#: The default number of steps from one profiled and audited step to the next.
EVERY = ActivationOptions().audit_every


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        width, layers, heads: of the Llama; it reads bytes.
        tokens, batch: of one step.
        error: the target.
        rounds: ordinary steps timed, interleaved; figures are medians.
        measured: how many profiled and audited steps are timed.
        threads: the threads that torch uses.
    """

    width: int = 512
    layers: int = 4
    heads: int = 8
    tokens: int = 512
    batch: int = 8
    error: float = 0.3
    rounds: int = 9
    measured: int = 3
    threads: int = 2


class Runner:
    """A model in training; `context` is entered around each forward and backward."""

    def __init__(self, sizes: Sizes) -> None:
        torch.manual_seed(0)
        self.model: Any = byte_llama(sizes.width, sizes.layers, sizes.heads, sizes.tokens)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.batch_BS = torch.randint(0, 256, (sizes.batch, sizes.tokens))
        self.context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def step(self) -> None:
        """Forward, backward and the optimizer."""
        self.optimizer.zero_grad()
        with self.context():
            next_byte(self.model, self.batch_BS).backward()
        self.optimizer.step()

    def seconds(self) -> float:
        """The seconds of one step."""
        started = time.perf_counter()
        self.step()
        return time.perf_counter() - started

    def peak(self) -> int:
        """Bytes of tensors at the fullest moment of one step."""
        return peak_of(self.model, self.optimizer, self.batch_BS, self.step)


def checkpointed(sizes: Sizes, layers: int) -> Runner:
    """Training that computes the first `layers` layers again in backward."""
    runner = Runner(sizes)
    for layer in runner.model.model.layers[:layers]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return runner


def compressed(sizes: Sizes, every: int) -> tuple[Runner, ActivationStore]:
    """Training with compressed activations, past the steps in which all sites are measured for the first time.

    Args:
        sizes: of all.
        every: steps between two that profile and audit.
    """
    runner = Runner(sizes)
    store = compress_activations(
        runner.model, error=sizes.error, options=ActivationOptions(profile_every=every, audit_every=every)
    )
    runner.context = lambda: store
    while True:
        runner.step()
        step = store.latest
        assert step is not None
        if step.audited if every == 1 else not (step.audited or step.profiled):
            return runner, store


def fewest_checkpointed(sizes: Sizes, peak: int) -> tuple[Runner, int, int]:
    """Training with the fewest checkpointed layers whose peak is no higher than `peak`, or with all of them.

    Returns:
        (the training, the number of layers, its peak in bytes).
    """
    for layers in range(1, sizes.layers + 1):
        runner = checkpointed(sizes, layers)
        runner.step()
        layer_peak = runner.peak()
        log.info("%d layers checkpointed: peak %d", layers, layer_peak)
        if layer_peak <= peak:
            break
    return runner, layers, layer_peak


def measure_times(sizes: Sizes = Sizes()) -> Measured:
    """Time plain, compressed and checkpointed steps in turns."""
    rounds: list[dict[str, Any]] = []
    with threads(sizes.threads), BackgroundLoad() as background:
        plain = Runner(sizes)
        plain.step()
        ours, store = compressed(sizes, EVERY)
        peaks = {"plain": plain.peak(), "compressed": ours.peak()}
        recomputed, layers, peaks["checkpoint"] = fewest_checkpointed(sizes, peaks["compressed"])
        assert store.latest is not None
        saved = store.latest.original / store.latest.held
        for _ in range(sizes.rounds):
            runners = {"plain": plain, "compressed": ours, "checkpoint": recomputed}
            rounds.append({"part": "times"} | {name: runner.seconds() for name, runner in runners.items()})
        del ours, recomputed, store
        measuring, _ = compressed(sizes, 1)
        for _ in range(sizes.measured):
            rounds.append({"part": "times", "plain": plain.seconds(), "measuring": measuring.seconds()})
    note = (
        f"{sizes.layers} layers of width {sizes.width}, {sizes.tokens} tokens x {sizes.batch}, error {sizes.error:g}; "
        f"{layers} of {sizes.layers} layers checkpointed; {sizes.threads} threads; {background.note()}"
    )
    figures = _figures(rounds) | {f"peak_{name}": float(bytes) for name, bytes in peaks.items()}
    figures["times_saved_ratio"] = saved
    figures["times_peak_ratio"] = peaks["plain"] / peaks["compressed"]
    figures["checkpoint_peak_over_compressed"] = peaks["checkpoint"] / peaks["compressed"]
    return Measured(figures, rounds, (note,))


def _figures(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds of the ratios within each."""
    turns = [r for r in rounds if "compressed" in r]
    ordinary = median(r["compressed"] / r["plain"] for r in turns)
    recomputed = median(r["checkpoint"] / r["plain"] for r in turns)
    measuring = median(r["measuring"] / r["plain"] for r in rounds if "measuring" in r)
    amortised = ((EVERY - 1) * ordinary + measuring) / EVERY
    return {
        "step_time_ratio": ordinary,
        "step_time_ratio_measuring": measuring,
        "step_time_ratio_amortised": amortised,
        "checkpoint_time_ratio": recomputed,
        "vs_checkpoint": median(r["compressed"] / r["checkpoint"] for r in turns),
        "vs_checkpoint_amortised": amortised / recomputed,
    }
