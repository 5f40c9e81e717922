"""The cost of precision on real models: every level, and levels allocated at the bytes of uniform 3 and 4 bits.

Each model's maps run on the same held-out data as the float32 model. Divergence is KL in nats for a model with logits,
and 1 - cosine for one that embeds. Agreement is the share of decisions (most likely token or class, nearest neighbour)
that are the same as in float32. Uniform and allocated maps are compared at equal resident bytes and equal input levels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from typing import Any

from benchmarks.models.cases import VARIABLE, Case, cases, data_folder
from foveate.allocate import Constraints, allocate
from foveate.bench.shared.result import Measured
from foveate.calibrate.quantize import quantize
from foveate.evaluate.verify import measure as measure_maps
from foveate.formats.levels import NESTED_LEVELS
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap, input_level_for
from foveate.precision.profiles import Profile
from foveate.progress import log

ALLOCATED = (3, 4)


def measure() -> Measured:
    """Measure every model of the data folder; without one, no figures and a note that says so."""
    folder = data_folder()
    if folder is None:
        return Measured({}, (), (f"skipped: {VARIABLE} is not set, and it names the folder with models and data",))
    return measure_cases(cases(folder))


def measure_cases(chosen: Iterable[Case]) -> Measured:
    """Measure the given models."""
    rounds: list[dict[str, Any]] = []
    notes: list[str] = []
    for case in chosen:
        started = time.perf_counter()
        rows, said = _measure_case(case)
        log.info("%s: %.0f s", case.name, time.perf_counter() - started)
        rounds += rows
        notes += [f"{case.name}: agreement is on the {case.decision}", *(f"{case.name}: {note}" for note in said)]
    return Measured(_figures(rounds), rounds, notes)


def _maps(profile: Profile) -> dict[str, PrecisionMap]:
    """Uniform and allocated maps by name; maps that are compared have inputs of the same level."""
    maps = {f"uniform {level}": profile.uniform(level) for level in NESTED_LEVELS}
    for level in ALLOCATED:
        budget = Budget(bytes=maps[f"uniform {level}"].bytes_resident)
        maps[f"allocated {level}"] = allocate(profile, budget, Constraints(input_level=input_level_for(level)))
    return maps


def _measure_case(case: Case) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    reference = copy.deepcopy(case.model)
    weights = sum(p.numel() for p in reference.parameters())
    size = sum(t.numel() * t.element_size() for t in (*reference.parameters(), *reference.buffers()))
    profile = quantize(case.model, case.calibration, objective=case.objective)
    maps = _maps(profile)
    plans = list(maps.values())
    outcomes = measure_maps(
        case.model, plans, case.evaluation, reference=reference, objective=case.objective, metric=case.metric
    )
    common = {"model": case.name, "weights": weights, "metric": case.metric_name}
    rows: list[dict[str, Any]] = []
    for name, plan, outcome in zip(("float32", *maps), (None, *plans), (outcomes[-1], *outcomes[:-1]), strict=True):
        rows.append(
            {
                **common,
                "map": name,
                "bits": 32.0 if plan is None else plan.bits,
                "bytes_resident": size if plan is None else plan.bytes_resident,
                "bytes_stored": size if plan is None else plan.bytes_stored,
                "value": outcome.metric,
                "divergence": outcome.divergence,
                "standard_error": outcome.standard_error,
                "predicted": 0.0 if plan is None else plan.predicted_loss,
                "agreement": outcome.agreement,
                "samples": outcome.samples,
            }
        )
    return rows, profile.notes


def _figures(rounds: list[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rounds:
        by_model.setdefault(row["model"], {})[row["map"]] = row
    worst: dict[str, list[float]] = {}
    for model, rows in by_model.items():
        metric, exact = rows["float32"]["metric"], rows["float32"]["value"]
        figures[f"{metric}_{model}_float32"] = exact
        for level in NESTED_LEVELS:
            row = rows[f"uniform {level}"]
            figures[f"bytes_{model}_b{level}"] = row["bytes_resident"]
            figures[f"{metric}_{model}_b{level}"] = row["value"]
            figures[f"kl_{model}_b{level}"] = row["divergence"]
            figures[f"agreement_{model}_b{level}"] = row["agreement"]
        for level in ALLOCATED:
            plan, even = rows[f"allocated {level}"], rows[f"uniform {level}"]
            figures[f"{metric}_{model}_b{level}_allocated"] = plan["value"]
            figures[f"kl_{model}_b{level}_allocated"] = plan["divergence"]
            ratio = plan["divergence"] / max(even["divergence"], 1e-12)
            figures[f"allocated_over_uniform_kl_b{level}_{model}"] = ratio
            worst.setdefault(f"allocated_over_uniform_kl_b{level}_worst", []).append(ratio)
        if metric != "loss":
            lost = 100 * (exact - rows["uniform 4"]["value"])
            figures[f"{metric}_loss_b4_points_{model}"] = lost
            worst.setdefault(f"{metric}_loss_b4_points_worst", []).append(lost)
    figures.update({name: max(values) for name, values in worst.items()})
    if "spearman_loss_b4_points_worst" in figures:
        figures["spearman_loss_b4_points"] = figures.pop("spearman_loss_b4_points_worst")
    if by_model:
        figures["agreement_b8_worst"] = min(rows["uniform 8"]["agreement"] for rows in by_model.values())
    return figures
