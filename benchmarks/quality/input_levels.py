"""The cost of low input levels, and how much `watch_inputs` recovers when the data drift.

**Levels.** Weights take the bytes of 4 bits, and inputs are chosen for 6 bits on average. The outputs are compared with
those of float32, and with those of inputs at 6 bits everywhere. No kernel of ours has 6-bit inputs, so they are
simulated: each row is rounded to 6 bits, once symmetric as our 8 and 16 bits are, and once with a zero point as our 4
bits have.

**Drift.** Scales are calibrated on clean data. Static scales lose quality on shifted data; the benchmark measures how
much of that loss `watch_inputs` recovers, and that it changes nothing where nothing shifted. The shifts are images made
brighter, images rounded as in a JPEG of low quality (Wallace, IEEE Trans. Consumer Electronics 1992), and a language
model that was calibrated on English prose and reads C and Python. A watch reacts after the batch that showed the drift,
and that text has only two batches: `recovered_after_first_batch_*` leave the first one out.

Legend: B images, C channels, H and W sizes, K inputs, M rows, n samples, D width of what is compared.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.cases import VARIABLE, Case, data_folder, mixed_llama, resnet20, resnet32, sentences
from benchmarks.models.resnet import MEAN, STD
from foveate.allocate import Constraints, allocate, variance_proxy
from foveate.bench.shared.result import Measured
from foveate.calibrate.quantize import quantize
from foveate.collect.objectives import run
from foveate.evaluate.verify import measure as measure_maps
from foveate.inputs import watch_inputs
from foveate.nn.levels import apply, use_static_scales, withdraw
from foveate.nn.modules import PlaneLinear
from foveate.nn.registry import registry_of
from foveate.precision.budgets import Budget
from foveate.precision.maps import Levels, PrecisionMap
from foveate.precision.profiles import Profile
from foveate.progress import log

AVERAGE = 6
PROSE, CODE = ("stories", "wiki", "shakespeare"), ("c", "python")
#: The quantization of luminance in annex K of the JPEG standard (ITU-T T.81), rows of 8.
JPEG = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip


def measure() -> Measured:
    """Measure the ResNets, MiniLM and lm of the data folder; without one, no figures and a note that says so."""
    folder = data_folder()
    if folder is None:
        return Measured({}, (), (f"skipped: {VARIABLE} is not set, and it names the folder with models and data",))
    return measure_all(folder)


def measure_all(folder: Path, share: float = 1.0) -> Measured:
    """Measure with a share of the data."""
    rounds: list[dict[str, Any]] = []
    for load in (resnet20, resnet32, sentences):
        started = time.perf_counter()
        case = load(folder, share)
        reference = copy.deepcopy(case.model)
        profile = quantize(case.model, case.calibration, objective=case.objective)
        rounds += _levels(case, reference, profile)
        if case.metric_name == "top1":
            shifts = {name: [shift(b) for b in case.evaluation] for name, shift in SHIFTS.items()}
            rounds += _drift(case, reference, profile, shifts)
        log.info("%s: %.0f s", case.name, time.perf_counter() - started)
    case = mixed_llama(folder, share, PROSE, PROSE)
    reference = copy.deepcopy(case.model)
    profile = quantize(case.model, case.calibration, objective=case.objective)
    rounds += _drift(case, reference, profile, {"code": mixed_llama(folder, share, PROSE, CODE).evaluation})
    notes = (
        "inputs under 8 bits save no time on a CPU: the kernels multiply bytes",
        "uniform 6-bit inputs are simulated by rounding each row in float32, and multiplied in float32",
    )
    return Measured(_figures(rounds), rounds, notes)


def rounded_rows(x_MK: Tensor, bits: int, zero_point: bool) -> Tensor:
    """Each row rounded to `bits`, symmetric or with a zero point, in its own range."""
    largest = 2**bits - 1 if zero_point else 2 ** (bits - 1) - 1
    step: Tensor
    if zero_point:
        low, high = x_MK.amin(-1, keepdim=True).clamp_max(0), x_MK.amax(-1, keepdim=True).clamp_min(0)
        step = ((high - low) / largest).clamp_min(1e-30)
        zero = torch.round(-low / step)
        return step * torch.minimum(torch.maximum(torch.round(x_MK / step), -zero), largest - zero)
    step = (x_MK.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-30)
    return step * torch.round(x_MK / step)


@contextmanager
def rounded_inputs(model: nn.Module, bits: int, zero_point: bool) -> Iterator[None]:
    """Within the block every input is rounded by `rounded_rows` and multiplied in float32.

    The weights are those that the model reads when the block begins.
    """

    def product(module: Any) -> Callable[[Tensor], Tensor]:
        w_NK = module.weight.dequantize()
        return lambda x: F.linear(rounded_rows(x.float(), bits, zero_point), w_NK, module.bias)

    modules = [cast(Any, m) for m in registry_of(model).inputs.values()]
    try:
        for module in modules:
            module.__dict__["forward" if isinstance(module, PlaneLinear) else "_product"] = product(module)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
            module.__dict__.pop("_product", None)


def _levels(case: Case, reference: nn.Module, profile: Profile) -> list[dict[str, Any]]:
    """Rows for weights at the bytes of 4 bits, and at 8 bits, with every choice of inputs."""
    rows, constraints = [], Constraints(input_bits=AVERAGE)
    for weights, base in (
        ("4 bits", allocate(profile, Budget(bytes=profile.uniform(4).bytes_resident))),
        ("8 bits", profile.uniform(8)),
    ):
        chosen = {
            "gradient": allocate(profile, Budget(bits=1e6), constraints),
            "variance": allocate(variance_proxy(profile), Budget(bits=1e6), constraints),
        }
        plans = {name: _with_inputs(profile, base, plan.levels) for name, plan in chosen.items()}
        for level in (4, 8, 32):
            plans[f"uniform {level}"] = _with_inputs(profile, base, {s.name: level for s in profile.input_sites()})

        def outcomes(maps: Sequence[PrecisionMap]) -> list[Any]:
            return measure_maps(
                case.model, maps, case.evaluation, reference=reference, objective=case.objective, metric=case.metric
            )

        *measured_outcomes, exact = outcomes(list(plans.values()))
        measured = dict(zip(plans, measured_outcomes, strict=True))
        apply(case.model, plans["uniform 32"], decider="benchmark")
        for zero_point in (False, True):
            with rounded_inputs(case.model, AVERAGE, zero_point):
                name = f"uniform {AVERAGE}" + (" with zero point" if zero_point else "")
                measured[name] = outcomes([plans["uniform 32"]])[0]
        withdraw(case.model, "benchmark")
        for name, outcome in measured.items():
            plan = plans.get(name)
            rows.append(
                {
                    "model": case.name,
                    "weights": weights,
                    "inputs": name,
                    "input_bits": float(AVERAGE) if plan is None else profile.input_bits(plan),
                    "divergence": outcome.divergence,
                    "standard_error": outcome.standard_error,
                    "predicted": None if plan is None else plan.predicted_loss,
                    "agreement": outcome.agreement,
                    "metric": case.metric_name,
                    "value": outcome.metric,
                    "exact_value": exact.metric,
                }
            )
    return rows


def _with_inputs(profile: Profile, base: PrecisionMap, levels: Any) -> PrecisionMap:
    """The map `base` with the given levels of inputs."""
    inputs: dict[str, Levels] = {s.name: levels[s.name] for s in profile.input_sites()}
    plan = replace(base, levels={**base.levels, **inputs})
    return replace(plan, predicted_loss=profile.predict(plan))


def brighter(x_BCHW: Tensor) -> Tensor:
    """Images 1.5 times as bright, clipped at white."""
    return _normalised((_pixels(x_BCHW) * 1.5 + 0.1).clamp(0, 1))


def jpeg_like(x_BCHW: Tensor, quality: float = 4.0) -> Tensor:
    """Images rounded as in a JPEG whose table is multiplied by `quality`, without subsampling of colours."""
    n = torch.arange(8.0)
    dct = torch.cos((2 * n + 1) * n[:, None] * math.pi / 16) / 2
    dct[0] /= 2**0.5
    table = torch.tensor(JPEG) * quality / 255
    p = _pixels(x_BCHW)
    b, c, h, w = p.shape
    blocks = (p - 0.5).view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    kept = (dct @ blocks @ dct.t() / table).round() * table
    back = (dct.t() @ kept @ dct).transpose(3, 4).reshape(b, c, h, w)
    return _normalised((back + 0.5).clamp(0, 1))


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {"brightness": brighter, "jpeg": jpeg_like}


def _pixels(x_BCHW: Tensor) -> Tensor:
    return x_BCHW * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def _normalised(p_BCHW: Tensor) -> Tensor:
    return (p_BCHW - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@dataclass(frozen=True)
class _Run:
    """The outcome of a run: mean divergence, that of all batches but the first, and what the watch changed."""

    divergence: float
    later: float
    changes: int
    raised: int


def _drift(
    case: Case, reference: nn.Module, profile: Profile, shifts: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Rows for static scales with and without a watch, on clean and on shifted data.

    Weights have 8 bits, inputs 6 on average or 8.
    """
    bases = {AVERAGE: allocate(profile, Budget(bits=1e6), Constraints(input_bits=AVERAGE)), 8: profile.uniform(8, 8)}
    model, rows = case.model, []
    for (bits, base), (name, batches) in itertools.product(bases.items(), {"none": case.evaluation, **shifts}.items()):
        row: dict[str, Any] = {"model": case.name, "input_bits": bits, "shift": name}
        for label, static, watched in (("token", False, False), ("static", True, False), ("watched", True, True)):
            apply(model, base)
            use_static_scales(model, static)
            outcome = _run(case, reference, batches, watched)
            row[f"divergence_{label}"] = outcome.divergence
            row[f"divergence_{label}_later"] = outcome.later
            if watched:
                row.update(changes=outcome.changes, raised=outcome.raised, inputs=len(profile.input_sites()))
        use_static_scales(model, False)
        rows.append(row)
    return rows


def _run(case: Case, reference: nn.Module, batches: Sequence[Any], watched: bool) -> _Run:
    parts: list[tuple[float, int]] = []
    watch = watch_inputs(case.model) if watched else None
    with torch.no_grad():
        for batch in batches:
            wanted = case.objective.outcome(run(reference, batch), batch)
            got = case.objective.outcome(run(case.model, batch), batch)
            parts.append((float(case.objective.divergence(wanted, got).double().sum()), len(wanted)))
    changes, raised = (len(watch.changes), len(watch.raised)) if watch is not None else (0, 0)
    if watch is not None:
        watch.close()
    return _Run(_mean(parts), _mean(parts[1:]), changes, raised)


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    """The mean over all samples, from the sums and counts of batches."""
    return sum(total for total, _ in parts) / max(sum(count for _, count in parts), 1)


def _figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    by_case: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rounds:
        if "inputs" in row and "shift" not in row:
            by_case.setdefault(row["model"], {})[row["weights"], row["inputs"]] = row
    for model, rows in by_case.items():
        ours = rows["4 bits", "gradient"]
        figures[f"input_bits_{model}"] = ours["input_bits"]
        figures[f"agreement_{model}"] = ours["agreement"]
        lost = 100 * (ours["exact_value"] - ours["value"])
        figures[f"{ours['metric']}_loss_points_{model}"] = lost
        for weights, label in (("4 bits", "kl"), ("8 bits", "kl_of_inputs")):
            chosen = rows[weights, "gradient"]["divergence"]
            for other, name in (
                (f"uniform {AVERAGE}", "over_uniform6"),
                (f"uniform {AVERAGE} with zero point", "over_uniform6_zero_point"),
                ("variance", "over_variance"),
            ):
                figures[f"{label}_{name}_{model}"] = chosen / max(rows[weights, other]["divergence"], 1e-12)
    if by_case:
        figures["kl_over_uniform6_worst"] = max(figures[f"kl_over_uniform6_{model}"] for model in by_case)
    recovered: dict[int, list[float]] = {}
    changes = 0
    for row in rounds:
        if "shift" not in row:
            continue
        if row["shift"] == "none":
            changes += row["changes"]
            continue
        static, watched = row["divergence_static"], row["divergence_watched"]
        name = f"{row['model']}_{row['shift']}_b{row['input_bits']}"
        figures[f"kl_static_{name}"] = static
        figures[f"raised_{name}"] = row["raised"]
        figures[f"recovered_{name}"] = (static - watched) / max(static, 1e-12)
        later = row["divergence_static_later"] - row["divergence_watched_later"]
        figures[f"recovered_after_first_batch_{name}"] = later / max(row["divergence_static_later"], 1e-12)
        recovered.setdefault(row["input_bits"], []).append(figures[f"recovered_{name}"])
    if recovered:
        figures.update({f"recovered_worst_b{bits}": min(shares) for bits, shares in recovered.items()})
        figures["changes_without_shift"] = changes
    return figures
