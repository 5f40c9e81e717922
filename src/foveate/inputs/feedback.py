"""Feedback: what the estimates of each weight are worth at the output, measured there.

An estimate is the squared gradient of an output times the squared error that the lower map makes there. It takes each
weight for the only one with an error. In a network the errors of many weights meet: later layers clip, normalize and
add them. So the divergence is measured at the output, with the other weights as rows decide, once with all rows of
one weight at its lower map and once at its higher one. Over the sum of its estimates that difference is a ratio, by
which the thresholds of this weight, upstream, are refined.

Ratios are noisy where a weight adds little. What all have in common is no factor, for the price follows. What is left
is drawn towards 1, in logarithms, by the share of its variance that is noise (the empirical Bayes estimate of random
effects: DerSimonian and Laird, Controlled Clinical Trials 1986).

Legend: n samples, b blocks of samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import Objective, run
from foveate.inputs.observe import Observed, observing
from foveate.inputs.verdict import BLOCK, as_decided, divergences
from foveate.precision.adaptation import Adaptation

#: The greatest factor by which a ratio counts as different from all others, up or down.
_MOST = 4.0


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one weight does to the divergence at the output, beside its estimates.

    Attributes:
        ratio: the measured difference between its two maps over the sum of its estimates.
        error: the standard error of the ratio.
    """

    ratio: float
    error: float


def factors_of(effects: Mapping[str, Effect]) -> dict[str, float]:
    """The factor of each weight, around 1: what is left of its ratio beside the common one, less its noise.

    A ratio that is not positive counts as the smallest that is told apart from the common one.
    """
    positive = sorted(effect.ratio for effect in effects.values() if effect.ratio > 0)
    if not positive:
        return dict.fromkeys(effects, 1.0)
    middle = positive[len(positive) // 2]
    logs, noise = {}, {}
    for name, effect in effects.items():
        ratio = min(max(effect.ratio, middle / _MOST), middle * _MOST)
        logs[name] = math.log(ratio)
        noise[name] = min(effect.error / ratio, 1e3) ** 2  # the variance of the logarithm
    # a ratio without any noise would alone decide what is common
    weights = {name: 1 / (variance + 1e-4) for name, variance in noise.items()}
    total = sum(weights.values())
    common = sum(weights[name] * logs[name] for name in logs) / total
    spread = sum(weights[name] * ((logs[name] - common) ** 2 - noise[name]) for name in logs) / total
    if not spread > 0:  # the noise explains all differences
        return dict.fromkeys(effects, 1.0)
    return {name: math.exp((logs[name] - common) * spread / (spread + noise[name])) for name in logs}


def output_effects(
    model: nn.Module,
    adaptation: Adaptation,
    renew: Callable[[Adaptation], None],
    batches: Sequence[Any],
    objective: Objective,
    progress: bool,
) -> dict[str, Effect]:
    """Measure what each weight that chooses does to the divergence from the model with every plane.

    Args:
        model: a quantized model whose inputs choose.
        adaptation: what is in force, and is again afterwards. Its factors are left out.
        renew: puts another adaptation in force.
        batches: data, as for `foveate.quantize`.
        objective: how outputs are compared.
        progress: whether to show a progress bar.
    """
    free = replace(adaptation, factors={})
    estimates: dict[str, float] = {}

    def add(found: Observed) -> None:
        estimates[found.site] = estimates.get(found.site, 0.0) + float(found.errors.double().sum())

    @contextmanager
    def forced(name: str, factor: float) -> Iterator[None]:
        with as_decided(model)():
            renew(replace(free, factors={name: factor}))
            yield

    try:
        renew(free)
        with evaluating(model), torch.no_grad(), observing(model, add):
            for batch in batches:
                run(model, batch)
        names = [name for name in adaptation.estimator.gradients if estimates.get(name, 0.0) > 0]
        ways: list[Callable[[], AbstractContextManager[None]]] = [
            functools.partial(forced, name, factor) for name in names for factor in (0.0, math.inf)
        ]
        found = divergences(model, batches, objective, ways, what="measuring at the output", progress=progress)
    finally:
        renew(adaptation)
    return {
        name: _effect(low_n.double() - high_n.double(), estimates[name])
        for name, low_n, high_n in zip(names, found[::2], found[1::2], strict=True)
    }


def _effect(difference_n: Tensor, estimates: float) -> Effect:
    """Of what each sample's divergence differs by, and the sum of the estimates of all rows."""
    mean, samples = float(difference_n.mean()), len(difference_n)
    size = min(BLOCK, max(1, samples // 8))
    blocks_b = difference_n[: samples // size * size].view(-1, size).mean(1)
    error = float(blocks_b.std() / len(blocks_b) ** 0.5) if len(blocks_b) > 1 else abs(mean)
    return Effect(ratio=mean * samples / estimates, error=error * samples / estimates)
