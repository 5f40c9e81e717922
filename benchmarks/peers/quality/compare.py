"""Ours against other libraries at equal bytes: `python -m benchmarks quality_peers`.

Every peer rounds the same layers of the same model in its own process, with the same calibration data. It returns
float32 matrices and the bytes of its format. They are put into the float model and measured by the same code as ours,
on the same held-out data. Ours is the map of lowest predicted loss whose stored bytes are at most the peer's. Only
weights are compared: inputs are exact on both sides.

Both sides have the same embeddings, our 8-bit ones, tied heads included, and neither side counts them. Layers that the
output does not depend on, and grouped convolutions, stay float on both sides.

Legend: N rows and K inputs of a weight.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.cases import VARIABLE, Case, cases, data_folder
from benchmarks.peers.child import PeerError
from benchmarks.peers.quality.figures import figures
from benchmarks.peers.quality.layers import Layers, gather, round_embeddings, set_weights
from benchmarks.peers.quality.one_level import round_for_one_level
from benchmarks.peers.quality.rounded import Peers, Work
from benchmarks.peers.quality.settings import POINTS, SETTINGS, STAND_IN, WINDOW, Setting
from foveate.allocate import Constraints, allocate
from foveate.bench.shared.result import Measured
from foveate.calibrate.one_weight import group_for
from foveate.calibrate.quantize import quantize
from foveate.collect.kinds import Kind, find_weights, kind_of
from foveate.collect.objectives import run
from foveate.errors import BudgetError
from foveate.formats.levels import NESTED_LEVELS, WEIGHT_LEVELS
from foveate.nn.levels import apply
from foveate.nn.registry import registry_of
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile
from foveate.progress import log

EXACT_INPUTS = 32
ONE_LEVEL = (4, 3)


def measure(settings: Sequence[Setting] = SETTINGS) -> Measured:
    """Measure every model of the data folder; without one, no figures and a note that says so."""
    folder = data_folder()
    if folder is None:
        return Measured({}, (), (f"skipped: {VARIABLE} is not set, and it names the folder with models and data",))
    return measure_cases(cases(folder), settings)


def measure_cases(chosen: Iterable[Case], settings: Sequence[Setting] = SETTINGS) -> Measured:
    """Measure the given models against the given settings of peers."""
    rounds: list[dict[str, Any]] = []
    notes: list[str] = []
    with Peers() as peers:
        for case in chosen:
            started = time.perf_counter()
            rows, said = measure_case(case, settings, peers)
            log.info("%s: %.0f s", case.name, time.perf_counter() - started)
            rounds += rows
            notes += [f"{case.name}: {note}" for note in said]
        notes += peers.versions()
    return Measured(figures(rounds), rounds, list(dict.fromkeys(notes)))


class HeldOut:
    """Measures the divergence of a model's outputs from the float model's on held-out data."""

    def __init__(self, case: Case, reference: nn.Module) -> None:
        self.case = case
        with torch.inference_mode():
            self.wanted = [case.objective.outcome(run(reference, batch), batch) for batch in case.evaluation]

    def divergence(self, model: nn.Module) -> float:
        """The mean divergence over samples, as `foveate.measure` computes it."""
        total, samples = 0.0, 0
        objective = self.case.objective
        with torch.inference_mode():
            for batch, wanted in zip(self.case.evaluation, self.wanted, strict=True):
                apart = objective.divergence(wanted, objective.outcome(run(model, batch), batch))
                total += float(apart.double().sum())
                samples += len(apart)
        return total / samples


class Ours:
    """Our planes of the same layers, at any bytes. Like the peers they are measured as dequantized float32 weights."""

    def __init__(self, base: nn.Module, skip: Sequence[str], case: Case, held_out: HeldOut) -> None:
        self.model, self.base, self.held_out = copy.deepcopy(base), copy.deepcopy(base), held_out
        self.profile: Profile = quantize(self.model, case.calibration, objective=case.objective, skip=tuple(skip))
        self.weights = sum(site.weights for site in self.profile.weight_sites())
        self._known: dict[PrecisionMap, float] = {}

    def bytes_of(self, plan: PrecisionMap) -> int:
        """The stored bytes of a map's planes, scales, gains and tile levels."""
        return plan.bytes_stored - plan.other_bytes

    def uniform(self, level: int) -> PrecisionMap:
        """The map with every weight at one level."""
        return self.profile.uniform(level, EXACT_INPUTS)

    def within(self, size: int) -> PrecisionMap:
        """The map of lowest predicted loss in `size` bytes; tiles are dropped only where 2 bits are too many."""
        budget = Budget(bits=8 * size / self.weights)
        try:
            return allocate(self.profile, budget, Constraints(input_level=EXACT_INPUTS))
        except BudgetError:
            return allocate(self.profile, budget, Constraints(levels=WEIGHT_LEVELS, input_level=EXACT_INPUTS))

    def divergence(self, plan: PrecisionMap) -> float:
        """The measured divergence of a map."""
        if plan not in self._known:
            apply(self.model, plan)
            weights = registry_of(self.model).weights
            set_weights(self.base, {site.removesuffix(":weight"): w.value.dequantize() for site, w in weights.items()})
            self._known[plan] = self.held_out.divergence(self.base)
        return self._known[plan]


def measure_case(case: Case, settings: Sequence[Setting], peers: Peers) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one model, and notes on them."""
    held_out = HeldOut(case, case.model)
    base = copy.deepcopy(case.model)
    compared = round_embeddings(base)
    layers = gather(base, compared, case.calibration, case.objective)
    names = {n for f in find_weights(base) for n in f.names}
    ours = Ours(base, sorted(names - set(layers.weights)), case, held_out)
    rows = [{"model": case.name, **row} for row in own_rows(ours, layers, base, held_out)]
    notes = [
        f"{name} is left float on both sides: the output does not depend on it, or it is grouped"
        for name in layers.left
    ]
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(Path(scratch), case, base, layers)
        for setting in (*settings, *stand_ins(base)):
            try:
                is_stand_in = setting.peer == STAND_IN
                dense, size = one_level_weights(layers, setting) if is_stand_in else peers.round(setting, work)
            except PeerError as error:
                notes.append(f"{setting.peer} {setting.name}: not measured: {error}")
                continue
            bits = 8 * size / ours.weights
            if abs(bits - POINTS[setting.point]) > WINDOW:
                notes.append(
                    f"{setting.peer} {setting.name}: left out: {bits:.2f} bits here, not about {POINTS[setting.point]}"
                )
                continue
            model = copy.deepcopy(base)
            set_weights(model, dense)
            rows.append({"model": case.name, **compare(setting, size, held_out.divergence(model), ours)})
            log.info("%s", rows[-1])
    return rows, notes


def own_rows(ours: Ours, layers: Layers, base: nn.Module, held_out: HeldOut) -> list[dict[str, Any]]:
    """The rows of our maps: at every level, rounded for one level only, and allocated at the points."""
    plans = {f"uniform {level}": ours.uniform(level) for level in NESTED_LEVELS}
    plans |= {f"allocated {point}": allocate_at(ours, bits) for point, bits in POINTS.items()}
    rows: list[dict[str, Any]] = [
        {
            "map": name,
            "bits": plan.bits,
            "bytes": ours.bytes_of(plan),
            "divergence": ours.divergence(plan),
            "predicted": plan.predicted_loss,
        }
        for name, plan in plans.items()
    ]
    for level in ONE_LEVEL:
        model = copy.deepcopy(base)
        set_weights(model, {name: one_level(layers, name, level) for name in layers.weights})
        rows.append({"map": f"{STAND_IN} {level}", "bits": float(level), "divergence": held_out.divergence(model)})
    return rows


def one_level(layers: Layers, name: str, level: int, group: int | None = None) -> Tensor:
    """A weight rounded for one level only."""
    w_NK, moments_KK = layers.weights[name], layers.moments[name]
    group = group_for(w_NK.shape[1]) if group is None else group
    return round_for_one_level(
        w_NK,
        level,
        group=group,
        input_energy_K=moments_KK.diagonal(),
        covariance_KK=moments_KK,
        gradients_BRR=layers.gradients[name][None],
    )


def stand_ins(model: nn.Module) -> list[Setting]:
    """Settings of our own one-level rounding near each point, for models with convolutions, which few peers support."""
    if not any(kind_of(m) is Kind.CONV for m in model.modules()):
        return []
    chosen = (("b4_25", 4, 128), ("b3_25", 3, 128), ("b2_5", 2, 64))
    return [Setting(STAND_IN, "", point, {"bits": level, "group": group}) for point, level, group in chosen]


def one_level_weights(layers: Layers, setting: Setting) -> tuple[dict[str, Tensor], int]:
    """Every weight rounded for one level only, and the bytes of its codes and of its float16 scales and offsets."""
    level, group = setting.arguments["bits"], setting.arguments["group"]
    dense = {name: one_level(layers, name, level, group) for name in layers.weights}
    size = sum(-(-level * w.numel() // 8) + 4 * w.shape[0] * -(-w.shape[1] // group) for w in layers.weights.values())
    return dense, size


def allocate_at(ours: Ours, bits: float) -> PrecisionMap:
    """Our map at `bits` bits per weight."""
    return ours.within(int(bits * ours.weights / 8))


def compare(setting: Setting, size: int, divergence: float, ours: Ours) -> dict[str, Any]:
    """The row that compares a peer's result with ours at its bytes."""
    plan = ours.within(size)
    own = ours.divergence(plan)
    return {
        "peer": setting.peer,
        "setting": setting.name,
        "point": setting.point,
        "bits": 8 * size / ours.weights,
        "bytes": size,
        "divergence": divergence,
        "ours_bytes": ours.bytes_of(plan),
        "ours_divergence": own,
        "ours_predicted": plan.predicted_loss,
        "ratio": own / max(divergence, 1e-12),
    }
