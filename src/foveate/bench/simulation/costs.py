"""Costs of a simulated server, measured on this machine: iterations and prompts of a Llama of random weights, KL of a
real small one.

Times do not depend on the values of weights, so they are those of a model of random codes whose layers are as wide as
those of a model of a billion weights. Random codes have no loss worth measuring. The KL is that of the Llama of 7 M
weights in `FOVEATE_DATA/lm`, on held-out text, along its own frontier; the time at a point of the frontier is that of
its mean level, between the measured levels.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.bench.decode import Shape
from foveate.bench.shared.extras import require
from foveate.bench.shared.random_model import random_llama
from foveate.bench.simulation.server import ServerCosts
from foveate.errors import DataError
from foveate.formats.levels import NESTED_LEVELS
from foveate.nn.foreign.cache_argument import cache_argument
from foveate.nn.registry import registry_of
from foveate.precision.maps import uniform
from foveate.progress import track

#: Tokens of the prompt that is timed, and of the cache that iterations are timed with.
_PROMPT = 128
_WINDOW = 256


@dataclass(frozen=True, kw_only=True)
class CostSizes:
    """How much is measured.

    Attributes:
        shape: of the model that is timed.
        batches: the batches that iterations are timed with, from 1 to the server's slots.
        rounds: how often each is timed; the least time counts, for other work on the machine only adds.
        points: indices of the frontier.
        windows: windows of 256 tokens that calibrate the small model, and that its KL is measured on.
    """

    shape: Shape = field(default_factory=lambda: Shape(layers=4))
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    rounds: int = 5
    points: int = 13
    windows: int = 32


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The small model on planes, with its frontier and what was measured of it.

    Attributes:
        model: the model.
        frontier: its chain of maps.
        kl: the measured KL at each map, nats a token, on the held-out windows.
        held_out: token ids, int64 [windows, 256].
        reference: the float model's log-probabilities of the held-out windows, one [1, 256, V] each.
    """

    model: Any
    frontier: fv.Frontier
    kl: tuple[float, ...]
    held_out: Tensor
    reference: tuple[Tensor, ...]


def subject(data: Path, sizes: CostSizes) -> Subject:
    """Quantize the small model and measure its frontier.

    Raises:
        DataError: there is no such model in the folder.
        MissingExtraError: transformers or numpy is not installed.
    """
    folder = data / "lm"
    if not folder.is_dir():
        raise DataError(f"there is no small language model {folder}")
    numpy, transformers = require("numpy"), require("transformers")

    def windows(name: str) -> Tensor:
        parts = [torch.from_numpy(numpy.load(file).astype("int64").reshape(-1)) for file in sorted(folder.glob(name))]
        each = max(1, sizes.windows // max(len(parts), 1))
        cut = [part[: each * _WINDOW].view(-1, _WINDOW) for part in parts if len(part) >= each * _WINDOW]
        if not cut:
            raise DataError(f"{folder} has no {name} of at least {each * _WINDOW} tokens")
        return torch.cat(cut)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration, held_out = windows("calibration_*_tokens.npy"), windows("eval_*_tokens.npy")
    with torch.inference_mode():
        reference = tuple(model(input_ids=ids[None]).logits.log_softmax(-1) for ids in held_out)
    profile = fv.quantize(model, [{"input_ids": ids} for ids in calibration.split(4)], progress=False)
    chain = fv.frontier(profile, sizes.points)
    kl = []
    for plan in track(chain, "KL along the frontier"):
        fv.apply(model, plan)
        kl.append(mean_kl(model, held_out, reference))
    # a chain is nested: where noise says that a cheaper map is better, both have the greater KL
    kl = list(itertools.accumulate(kl, max))
    fv.apply(model, chain[0])
    return Subject(model=model, frontier=chain, kl=tuple(kl), held_out=held_out, reference=reference)


def mean_kl(model: Any, held_out: Tensor, reference: Sequence[Tensor]) -> float:
    """The mean KL of a token over windows, in nats."""
    with torch.inference_mode():
        return sum(
            kl_of(model(input_ids=ids[None]).logits, one) for ids, one in zip(held_out, reference, strict=True)
        ) / len(reference)


def kl_of(logits: Tensor, reference: Tensor) -> float:
    """The mean KL of a token between log-probabilities and logits, in nats, at least 0."""
    return max(0.0, float((reference.exp() * (reference - logits.float().log_softmax(-1))).sum(-1).mean()))


def timed(sizes: CostSizes) -> tuple[dict[int, dict[int, float]], dict[int, float]]:
    """Seconds on this machine: of an iteration by level and batch, and of a token of a prompt by level.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    model: Any = random_llama(**sizes.shape.config(_PROMPT + 2 * sizes.rounds * len(NESTED_LEVELS)))
    cache_class = require("transformers").DynamicCache
    registry = registry_of(model)
    maps = {level: uniform(registry.sites, level, registry.other_bytes) for level in NESTED_LEVELS}
    iterations: dict[int, dict[int, float]] = {level: {} for level in NESTED_LEVELS}
    prompts = dict.fromkeys(NESTED_LEVELS, math.inf)
    with torch.inference_mode():
        for batch in track(sizes.batches, "iterations"):
            cache = cache_class(config=model.config)
            given = cache_argument(model, cache)
            model(input_ids=torch.zeros(batch, 16, dtype=torch.int64), **given, use_cache=True)
            best = dict.fromkeys(NESTED_LEVELS, math.inf)
            for _, level in itertools.product(range(sizes.rounds), NESTED_LEVELS):
                fv.apply(model, maps[level])
                started = time.perf_counter()
                model(input_ids=torch.zeros(batch, 1, dtype=torch.int64), **given, use_cache=True)
                best[level] = min(best[level], time.perf_counter() - started)
            for level in NESTED_LEVELS:
                iterations[level][batch] = best[level]
        ids = torch.zeros(1, _PROMPT, dtype=torch.int64)
        for _, level in itertools.product(range(sizes.rounds), NESTED_LEVELS):
            fv.apply(model, maps[level])
            started = time.perf_counter()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            prompts[level] = min(prompts[level], (time.perf_counter() - started) / _PROMPT)
    return iterations, prompts


def server_costs(
    bits: Sequence[float],
    kl: Sequence[float],
    iterations: Mapping[int, Mapping[int, float]],
    prompts: Mapping[int, float],
) -> ServerCosts:
    """The costs at each index, between those of the measured levels and batches.

    Args:
        bits: the mean level of the weights at each index.
        kl: the KL at each index.
        iterations: seconds by level and batch.
        prompts: seconds of a token of a prompt, by level.
    """
    levels = sorted(iterations)
    batches = sorted(iterations[levels[0]])
    by_level = {
        level: [_between(n, batches, [iterations[level][b] for b in batches]) for n in range(1, batches[-1] + 1)]
        for level in levels
    }
    rows = []
    for b in bits:
        row = [_between(b, levels, [by_level[level][n] for level in levels]) for n in range(batches[-1])]
        rows.append(tuple(itertools.accumulate(row, max)))  # a greater batch never takes less time
    prompt = tuple(_between(b, levels, [prompts[level] for level in levels]) for b in bits)
    return ServerCosts(kl=tuple(kl), iteration=tuple(rows), prompt_token=prompt)


def mean_level(plan: fv.PrecisionMap) -> float:
    """The mean level of a weight that a token reads."""
    sites = list(plan.weight_sites())
    return sum(plan.mean_level(s) * s.weights for s in sites) / sum(s.weights for s in sites)


def _between(x: float, known: Sequence[float], values: Sequence[float]) -> float:
    """Linear interpolation, constant beyond the ends."""
    if x <= known[0]:
        return values[0]
    for (left, low), (right, high) in itertools.pairwise(zip(known, values, strict=True)):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return values[-1]
