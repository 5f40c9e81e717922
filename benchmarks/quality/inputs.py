"""Inputs that choose their precision beside the best static map: `python -m benchmarks inputs`.

Real Llamas read real text. Two neighbouring maps of one frontier stand 0.25 bits below and above the target, and every
token chooses between them for each weight (`foveate.adapt_to_input`). The price of a byte is found on the calibration
data; all figures are of held-out text, against the float32 model:

    dynamic_over_static_kl_<model>_b<bits>   KL over that of the best static map (strips) of as many bits
    random_over_static_kl_<model>_b<bits>    the same where each token draws one of the two maps
    at_resident_bytes_<model>_b<bits>        KL over that of the static map as large as the higher of the two
    bits_off_<model>_b<bits>                 how far the mean bits are from the target, as a share
    bits_batch8_<model>_b<bits>              the bits that a batch of 8 tokens reads: the union of what its rows choose
    estimate_rank_correlation_<model>        Spearman's correlation of estimated and true relative output error within a
                                             layer, the median over layers; estimate_ratio the median of their ratio
    dynamic_over_static_kl, models_significant   the geometric mean, and models whose bootstrap interval is below 1

`foveate bench inputs` measures the time of the decision; its figures are added. `--switch NAME` measures enhancements
in place of all this, each alone (`benchmarks.quality.switches`).

Legend: M rows of inputs, n samples.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import smollm2
from benchmarks.models.cases import VARIABLE, Case, babyllama105, data_folder, mixed_llama, stories260k
from benchmarks.peers.equal_quality.compare import WORK
from benchmarks.quality.switches import measure_switches
from foveate.allocate import allocate
from foveate.bench.inputs import measure as measure_times
from foveate.bench.inputs import spearman
from foveate.bench.shared.result import Measured
from foveate.calibrate.quantize import quantize
from foveate.errors import FoveateError
from foveate.inputs.adapt import AdaptOptions, adapt_to_input
from foveate.inputs.explain import chosen_maps, explain
from foveate.inputs.input_adaptation import InputAdaptation, Tally
from foveate.inputs.multiplier import Shares
from foveate.inputs.verdict import as_decided, divergences, ratio_interval, static
from foveate.nn.levels import apply, row_precision, state_of, withdraw
from foveate.precision.budgets import Budget
from foveate.precision.frontiers import Frontier
from foveate.precision.profiles import Profile
from foveate.precision.state import Request
from foveate.progress import log

BITS = (3.25, 4.0, 5.0)
MODELS: dict[str, Callable[[Path, float], Case]] = {
    "stories260k": stories260k,
    "babyllama105": babyllama105,
    "lm": mixed_llama,
}
#: Measured where it is named, below the 4 bits of the grid that its weights stand on.
SMOLLM2 = "smollm2"
_DECIDER = "benchmark"


def measure(
    switches: Sequence[str] = (), models: Sequence[str] = (), bits: Sequence[float] = (), share: float = 1.0
) -> Measured:
    """Measure the Llamas of the data folder; without one only times, and a note that says so.

    Args:
        switches: measure these instead (`benchmarks.quality.switches`).
        models: the names of some of the models, or `smollm2`; all but that if none is given.
        bits: the means; `BITS` if none is given.
        share: of the data.

    Raises:
        FoveateError: there is no such model or switch, or no data to measure switches on.
    """
    folder = data_folder()
    unknown = [name for name in models if name not in (*MODELS, SMOLLM2)]
    if unknown:
        raise FoveateError(f"model (={unknown[0]!r}) is not one of {', '.join((*MODELS, SMOLLM2))}")
    cases = [load for name, load in MODELS.items() if not models or name in models]
    if switches:
        if folder is None:
            raise FoveateError(f"{VARIABLE} is not set, and it names the folder with models and data")
        return measure_switches(folder, share, cases, bits or BITS, list(switches))
    times = measure_times()
    if folder is None:
        note = f"models skipped: {VARIABLE} is not set, and it names the folder with models and data"
        return Measured(times.figures, times.rounds, (*times.notes, note))
    found = measure_models(folder, share, cases, bits or BITS, WORK if SMOLLM2 in models else None)
    return Measured({**found.figures, **times.figures}, [*found.rounds, *times.rounds], times.notes)


def measure_models(
    folder: Path,
    share: float = 1.0,
    cases: Sequence[Callable[..., Case]] = tuple(MODELS.values()),
    means: Sequence[float] = BITS,
    work: Path | None = None,
) -> Measured:
    """The figures of models, with a share of the data; of SmolLM2 too where the folder is named that it is kept in."""
    rounds = []

    def measured(case: Case, reference: nn.Module, profile: Profile, means: Sequence[float]) -> None:
        started = time.perf_counter()
        for bits in means:
            rounds.append(_row(case, reference, profile, bits))
            log.info("%s", rounds[-1])
        log.info("%s: %.0f s", case.name, time.perf_counter() - started)

    for load in cases:
        case = load(folder, share)
        reference = copy.deepcopy(case.model)
        measured(case, reference, quantize(case.model, case.calibration, objective=case.objective), means)
    if work is not None:
        measured(*smollm2.smollm2(folder, work, share), [bits for bits in means if bits < 4])
    return Measured(_figures(rounds), rounds)


def _row(case: Case, reference: nn.Module, profile: Profile, bits: float) -> dict[str, Any]:
    """One model at one number of bits."""
    model = case.model
    best = allocate(profile, Budget(bits=bits))
    options = AdaptOptions(verdict=False)
    with adapt_to_input(
        model, bits=bits, batches=case.calibration, objective=case.objective, options=options
    ) as adapted:
        low, high = chosen_maps(model)
        ((far, near),) = state_of(model).ends
        chain = adapted.frontier
        tallies: list[Tally] = []
        ways: list[Callable[[], AbstractContextManager[None]]] = [
            as_decided(model, lambda: tallies.append(_since(adapted))),
            static(model, best),
            static(model, high),
        ]
        ours_n, static_n, high_n = divergences(model, case.evaluation, case.objective, ways, reference=reference)
        seen = explain(model, case.evaluation[0])
        correlation, ratio = _estimates(model, case.evaluation[0])
        shares = Shares.between(low, high)
        union = shares.mean({layer.site: _any_of_8(layer.reads_high) for layer in seen.layers})
    share = (bits - chain.bits(far)) / (chain.bits(near) - chain.bits(far))
    drawn = _drawn(model, chain, (far, near), share, [batch.numel() for batch in case.evaluation])
    (random_n,) = divergences(model, case.evaluation, case.objective, [drawn], reference=reference)
    samples = sum(tally.samples for tally in tallies)
    interval = ratio_interval(ours_n, static_n)
    return {
        "model": case.name,
        "bits": bits,
        "kl": float(ours_n.double().mean()),
        "static_kl": float(static_n.double().mean()),
        "high_kl": float(high_n.double().mean()),
        "random_kl": float(random_n.double().mean()),
        "interval": interval,
        "bits_read": sum(tally.samples * tally.bits for tally in tallies) / samples,
        "static_bits": best.bits,
        "ends": (chain.bits(far), chain.bits(near)),
        "union_bits": union,
        "correlation": correlation,
        "ratio": ratio,
        "multiplier": adapted.correction.multiplier,
        "samples": len(ours_n),
    }


def _since(adapted: InputAdaptation) -> Tally:
    """What was read since the last batch. A batch in which the correction took a step counts by it."""
    before, found = adapted.correction, adapted.tally()
    return found if found.samples else Tally(float(before.every), before.mean, before.mean)


def _any_of_8(reads_high: Tensor) -> float:
    """The share of batches of 8 rows of which any reads the higher map."""
    whole = reads_high[: len(reads_high) // 8 * 8].view(-1, 8)
    return float(whole.any(1).float().mean())


def _drawn(
    model: nn.Module, chain: Frontier, ends: tuple[int, int], share: float, tokens: Sequence[int]
) -> Callable[[], AbstractContextManager[None]]:
    """A way of reading the model: each token draws one of two maps."""
    generator, counts = torch.Generator().manual_seed(0), iter(tokens)

    @contextmanager
    def way() -> Iterator[None]:
        apply(model, chain, decider=_DECIDER)
        high = torch.rand(next(counts), generator=generator) < share
        with row_precision(model, [Request(tier=ends[int(one)]) for one in high.tolist()]):
            yield
        withdraw(model, _DECIDER)

    return way


def _estimates(model: nn.Module, batch: Any) -> tuple[float, float]:
    """The median over layers of Spearman's correlation of estimated and true relative error, and of their ratio."""
    sizes: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, "input_place"):

            def keep(_: nn.Module, args: Any, y: Tensor, name: str = name) -> None:
                sizes[f"{name}:input"] = y.flatten(0, -2).float().square().sum(1)

            hooks.append(module.register_forward_hook(keep))
    found = explain(model, batch)
    for hook in hooks:
        hook.remove()
    correlations, ratios = [], []
    for layer in found.layers:
        if not bool((layer.true > 0).any()):
            continue
        size = sizes[layer.input_site]
        correlations.append(spearman(layer.estimated / size, layer.true / size))
        ratios.append(float((layer.estimated / layer.true.clamp_min(1e-30)).median()))
    return statistics.median(correlations), statistics.median(ratios)


def _figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    ratios, significant = [], set()
    for row in rounds:
        name = f"{row['model']}_b{row['bits']:g}"
        ratios.append(row["kl"] / row["static_kl"])
        figures[f"dynamic_over_static_kl_{name}"] = ratios[-1]
        figures[f"random_over_static_kl_{name}"] = row["random_kl"] / row["static_kl"]
        figures[f"at_resident_bytes_{name}"] = row["kl"] / row["high_kl"]
        figures[f"bits_off_{name}"] = row["bits_read"] / row["bits"] - 1
        figures[f"bits_batch8_{name}"] = row["union_bits"]
        figures[f"estimate_rank_correlation_{name}"] = row["correlation"]
        figures[f"estimate_ratio_{name}"] = row["ratio"]
        if row["interval"][1] < 1:
            significant.add(row["model"])
    if ratios:
        figures["dynamic_over_static_kl"] = math.exp(statistics.fmean(map(math.log, ratios)))
        figures["models_significant"] = len(significant)
    return figures
