"""Classifiers that read few bits first, and more where the margin is thin: `python -m benchmarks cascade`.

Two ResNets on CIFAR-10. The two maps and the threshold of a cascade (`foveate.cascade`) are set on augmented training
images, for plain ones are known by heart; so is the cheapest single map. What is asked is that 99 % of the images get
the class that the float32 model gives them. All figures are of test images:

    cascade_bits_ratio_<model>      bits of a weight that an image reads, both readings counted, over the single map's
    cascade_share_<model>           the images that are read twice
    cascade_agreement_<model>, static_agreement_<model>, cascade_bits_<model>, static_bits_<model>
    cascade_bits_ratio              the greater of the two ratios

Beside them what choosing layer by layer gives at 4 bits (`foveate.adapt_to_input`), there and on all-MiniLM-L6-v2:

    adapt_ratio_<model>             divergence over that of the best static map; adapt_high_<model> the interval's end
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.cases import VARIABLE, Case, augmented_images, data_folder, resnet20, resnet32, sentences
from foveate.bench.shared.result import Measured
from foveate.calibrate.quantize import quantize
from foveate.errors import BudgetError
from foveate.inputs.adapt import adapt_to_input, nearest
from foveate.inputs.cascading import cascade
from foveate.nn.levels import apply, withdraw
from foveate.precision.maps import PrecisionMap
from foveate.progress import log

AGREEMENT, ADAPT_BITS = 0.99, 4.0
_CLASSIFIERS: tuple[Callable[[Path, float], Case], ...] = (resnet20, resnet32)


def measure() -> Measured:
    """Measure the models of the data folder; without one nothing, and a note that says so."""
    folder = data_folder()
    if folder is None:
        return Measured({}, [], (f"skipped: {VARIABLE} is not set, and it names the folder with models and data",))
    return measure_models(folder)


def measure_models(folder: Path, share: float = 1.0) -> Measured:
    """The figures, with a share of the data."""
    rounds: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    notes = []
    for load in (*_CLASSIFIERS, sentences):
        case = load(folder, share)
        reference = copy.deepcopy(case.model)
        quantize(case.model, case.calibration, objective=case.objective)
        if load is not sentences:
            row = _cascade(case, reference, augmented_images(folder, share))
            rounds.append(row)
            figures |= {f"{key}_{case.name}": value for key, value in row.items() if key != "model"}
        try:
            with adapt_to_input(
                case.model, bits=ADAPT_BITS, batches=_parts(case.calibration), objective=case.objective
            ) as adapted:
                assert adapted.verdict is not None
                figures[f"adapt_ratio_{case.name}"] = adapted.verdict.ratio
                figures[f"adapt_high_{case.name}"] = adapted.verdict.interval[1]
                notes.append(f"{case.name}: {adapted.verdict}")
        except BudgetError as error:
            notes.append(f"{case.name}: {error}")
        log.info("%s", notes[-1])
    figures["cascade_bits_ratio"] = max(v for k, v in figures.items() if k.startswith("cascade_bits_ratio_"))
    return Measured(figures, rounds, tuple(notes))


def _parts(batches: Sequence[Any]) -> list[Any]:
    """At least eight batches, so that a quarter is held out."""
    if len(batches) >= 8 or not isinstance(batches[0], Tensor):
        return list(batches)
    whole = torch.cat(list(batches))
    return list(whole.split(max(1, len(whole) // 8)))


def _cascade(case: Case, reference: torch.nn.Module, images: Sequence[Tensor]) -> dict[str, Any]:
    with torch.no_grad():
        wanted_n = torch.cat([reference(x).argmax(1) for x in case.evaluation])
    with cascade(case.model, batches=images, agreement=AGREEMENT, reference=reference) as classify:
        log.info("%s: %s", case.name, classify)
        with torch.no_grad():
            got_n = torch.cat([classify(x).argmax(1) for x in case.evaluation])
        bits, read_twice = classify.bits, classify.share
        assert classify.verdict is not None
        static_bits = classify.verdict.static_bits
        plan = classify.frontier[nearest(classify.frontier, static_bits)]
    static_n = _read_at(case, plan)
    return {
        "model": case.name,
        "cascade_bits_ratio": bits / static_bits,
        "cascade_bits": bits,
        "static_bits": static_bits,
        "cascade_share": read_twice,
        "cascade_agreement": float((got_n == wanted_n).double().mean()),
        "static_agreement": float((static_n == wanted_n).double().mean()),
    }


def _read_at(case: Case, plan: PrecisionMap) -> Tensor:
    apply(case.model, plan, decider="benchmark")
    try:
        with torch.no_grad():
            return torch.cat([case.model(x).argmax(1) for x in case.evaluation])
    finally:
        withdraw(case.model, "benchmark")
