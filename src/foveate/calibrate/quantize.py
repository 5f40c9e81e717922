"""quantize: put a model on planes, in place, and measure what each tile is worth at each level.

    find the weights -> passes over the data (statistics) -> for each weight: round, pack, score
    -> replace the modules -> Profile

The first pass over the data takes the longest and can be resumed. It is the only one where memory allows it. Otherwise
`foveate.calibrate.passes` makes further ones, and hands out the weights part by part as their statistics are complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from foveate.calibrate.one_weight import QuantizedWeight, round_and_score, rows_of_covariances, saw_too_little
from foveate.calibrate.parallel import in_parallel, weight_work
from foveate.calibrate.passes.calibration import Calibration
from foveate.calibrate.passes.options import PLANES, ROUNDING, STATISTICS, CalibrationOptions, one_step
from foveate.calibrate.processes.group import Processes
from foveate.calibrate.processes.owners import exchanged
from foveate.calibrate.reference_outputs import with_measured
from foveate.calibrate.routing import Routing
from foveate.calibrate.trial import OriginalModules, run_on_planes
from foveate.collect.evaluation import frozen
from foveate.collect.kinds import QuantizableWeight, find_weights, listed, weight_matrix_shape
from foveate.collect.objectives import Objective
from foveate.errors import SiteError, WeightError
from foveate.formats.levels import TOP_LEVEL
from foveate.kernels.backends.table import ensure_loaded
from foveate.memory.allocator import given_back
from foveate.nn.decoder.fuse import fuse
from foveate.nn.experts import left_notes, merged, taken_apart
from foveate.nn.foreign.derived import split_derived
from foveate.nn.plane_module import PlaneModule
from foveate.nn.replace import install
from foveate.nn.weight import PlaneWeight
from foveate.planes import gathered
from foveate.precision.profiles import EXACT, FITTED, Profile
from foveate.precision.sites import stays_float
from foveate.progress import Bar
from foveate.rounding.exact import KeepExact
from foveate.sizes import parse_bytes

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: A note lists the parameters that stay float if they are at least this part of the number on planes.
_MUCH = 0.02


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    objective: Objective | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    group: int | None = None,
    skip: Sequence[str] = (),
    exact: float | KeepExact | None = None,
    memory: int | str | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    processes: ProcessGroup | None = None,
) -> Profile:
    """Store every weight of a model as bit planes, in place, and measure what each tile is worth at each level.

    Linear layers, transformers' Conv1D, embeddings and convolutions are replaced by their `foveate.nn` counterparts;
    tied weights stay one weight, and the experts of transformers' mixtures become weights of their own. Where
    calibration sees other code than its module's read a weight (`x @ self.head.weight.t()`), the weight stays float,
    and the profile's notes name it. Afterwards every weight is read at 8 bits.

    Args:
        model: any module, in memory, on the CPU.
        batches: a small data set: mappings are passed to the model as keywords, tuples as positions, anything else as
            the one argument.
        objective: what the output is for, `foveate.Logits()` or `foveate.Embedding()`; inferred from the first output
            if not given (one with a `logits` attribute is `Logits`).
        loss: `loss(output, batch)`, a sum over the samples of the batch whose increase is to be kept small, instead of
            the objective's own.
        group: inputs a group, 32, 64 or 128, for every weight; chosen by width if not given.
        skip: shell patterns of module names to leave as they are.
        exact: the share of tiles that keep their exact values too, as floating point of 16 bits, so that maps can read
            them at level 16: those that lose most at 3 bits, or with 1 all. `foveate.KeepExact(share=0.01, level=32)`
            keeps 32 bits.
        memory: the most bytes that the process may take during the call, the model included, `"6GiB"` or a number. If
            not given, calibration stays within twice the model's bytes beside the model where that takes little more
            time, and within three quarters of the free memory otherwise. Where there is too little to do everything at
            once, parts of the model run twice, statistics are collected in several passes over the data, and float
            weights are freed as their planes are finished (an interruption then leaves a model without them). The
            result is the same.
        resume: a file that keeps the statistics as they grow; if it exists, the batches it has seen are skipped. It is
            deleted at the end.
        progress: whether to show progress.
        processes: a process group of torch.distributed with gloo, whose processes share the work. Each calls this with
            the same model and all of the same batches, and gets the same result, whatever their number (a group of
            one included). A process may wait for others as long as they round, so give the group a long timeout.
            `memory` is for each process. `resume` is then the beginning of the names of files that all
            of them can reach, and any number of processes can go on from them.

    Returns:
        The profile: sites, and the loss of every tile at every level.

    Raises:
        DataError: no batches, or a loss that is not finite.
        WeightError: a weight holds NaN or Inf, no weight can be quantized, or the model does not run on planes. The
            model is then unchanged, unless float weights were freed to save memory.
        SiteError: a pattern in `skip` matches nothing.
        BudgetError: `exact` is not a share of tiles; or the model cannot be quantized in `memory`, and the message says
            how much is enough.
    """
    options = CalibrationOptions(
        objective=objective,
        loss=loss,
        memory=None if memory is None else parse_bytes(memory),
        resume=Path(resume) if resume else None,
        progress=progress,
        exact=exact if exact is None or isinstance(exact, KeepExact) else KeepExact(share=exact),
        processes=processes,
    )
    return quantize_with(model, batches, group, skip, options, Bar("quantizing", show=progress))


def quantize_with(
    model: nn.Module,
    batches: Iterable[Any],
    group: int | None,
    skip: Sequence[str],
    options: CalibrationOptions,
    bar: Bar,
) -> Profile:
    """As `quantize`, with a bar of the caller's, which then knows the seconds of each phase."""
    ensure_loaded()
    with taken_apart(model), split_derived(model), given_back(options.memory is not None), closing(bar):
        # a function of its own: its statistics are freed before memory is given back
        return _quantized(model, batches, group, skip, options, bar)


def _quantized(
    model: nn.Module,
    batches: Iterable[Any],
    group: int | None,
    skip: Sequence[str],
    options: CalibrationOptions,
    bar: Bar,
) -> Profile:
    found, notes = chosen(model, skip)
    for entry in found:
        weight = cast(Tensor, entry.modules[0].weight)
        if weight.device.type != "cpu":
            raise WeightError(f"{entry.names[0]}.weight is on {weight.device}: load the model on the CPU")
        _check_values(entry.names[0], weight.detach())
    Processes(options.processes).check_options(group=group)
    calibration = Calibration(model, batches, found, options, bar)
    with given_back(calibration.schedule.replay or calibration.schedule.free_early):
        rounded, routing, few = _all_rounded(model, calibration, group, options.exact, bar)
    calibration.free_weights()
    bar.note(STATISTICS, calibration.collector.seconds)
    collector, found = calibration.collector, calibration.found
    notes += [*calibration.notes, *_notes(calibration, routing, few, guessed=options.objective is None)]
    done = [rounded[entry.names[0]] for entry in found]
    sites = [q.site for q in done]
    weights = {q.site.name: PlaneWeight(q.planes, q.dtype) for q in done}
    losses = {q.site.name: q.losses for q in done}
    statistics = {q.site.name: q.statistics for q in done}
    if options.exact is not None:
        together = {s.name: s.grid[1] if FITTED in statistics[s.name] else 1 for s in sites}
        kept_exact = options.exact.chosen({name: w.value for name, w in weights.items()}, losses, together)
        for name, tiles in kept_exact.items():
            weights[name].set(replace(weights[name].value, exact=tiles))
            if tiles is not None:
                statistics[name][EXACT] = tiles.levels().view(-1).float()
    del rounded, done
    for kept, value in zip(weights.values(), gathered([w.value for w in weights.values()]), strict=True):
        kept.set(value)
    originals = OriginalModules(model, found)
    with originals.restored_on(BaseException), one_step(bar, PLANES):
        registry = install(model, found, sites, weights)
        run_on_planes(model, calibration.first, calibration.generates)
    weight_count = sum(s.weights for s in sites)
    if sum(registry.other_parameters.values()) >= _MUCH * weight_count:
        notes.append(stays_float(registry.other_parameters, weight_count))
    for name in registry.inputs:
        node = collector.by_module.get(name.removesuffix(":input"))
        if node is not None and node.inputs is not None:
            if float(node.tensors["rows"]):  # an input that was never seen has an unknown cost, not none
                losses[name] = node.inputs.losses(collector.samples)
            statistics[name] = node.inputs.summary(collector.samples)
    profile = Profile(
        registry.sites,
        losses,
        registry.other_bytes,
        collector.samples,
        collector.objective.name,
        statistics,
        tuple(notes),
        other_parameters=registry.other_parameters,
    )
    with originals.restored_on(Exception):
        try:
            with frozen(model):
                profile = with_measured(profile, model, registry, calibration.reference_outputs, bar)
        finally:  # an interruption leaves a model that is read at 8 bits and has its profile
            registry.profile = profile
            top = profile.uniform(TOP_LEVEL)
            registry.apply(top)
    calibration.finish()
    fuse(model)
    return profile


def chosen(model: nn.Module, skip: Sequence[str]) -> tuple[list[QuantizableWeight], list[str]]:
    """The weights to quantize, and notes on weights that stay float; raises the errors of `quantize`."""
    if any(isinstance(m, PlaneModule) for m in model.modules()):
        raise WeightError("the model is quantized already: quantize the original")
    found = find_weights(model)
    if not found:
        raise WeightError(
            f"{type(model).__name__} has no weight that can be quantized (Linear, Conv1D, Embedding, Conv1d, Conv2d)"
        )
    names = [name for f in found for name in f.names]
    if "" in names:
        raise WeightError("the model is itself a single layer: put it into a module, such as nn.Sequential")
    skip = (skip,) if isinstance(skip, str) else skip
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SiteError(
                f"pattern {pattern!r} in skip matches none of {len(names)} modules, "
                f"which are like {', '.join(names[:3])}"
            )
    left = [any(fnmatchcase(name, pattern) for name in f.names for pattern in skip) for f in found]
    kept = [f for f, out in zip(found, left, strict=True) if not out]
    if not kept:
        raise WeightError("skip leaves no weight to quantize")
    skipped = [f.names[0] for f, out in zip(found, left, strict=True) if out]
    return kept, [*(f"{name} was left as it is" for name in merged(model, skipped)), *left_notes(model)]


def _check_values(name: str, weight: Tensor) -> None:
    """Refuse before any work the weights that rounding would refuse."""
    if weight.dtype not in _DTYPES:
        raise WeightError(f"{name}.weight is {weight.dtype}: load the model in float16, bfloat16 or float32")
    lowest, highest = torch.aminmax(weight)
    largest = float(torch.maximum(-lowest, highest))
    if not largest < float("inf"):  # NaN fails too
        raise WeightError(f"{name}.weight holds NaN or Inf")
    if largest > torch.finfo(torch.float16).max:
        raise WeightError(f"{name}: weight (largest magnitude {largest:g}) is beyond 65504, the range of float16")


def _all_rounded(
    model: nn.Module, calibration: Calibration, group: int | None, exact: KeepExact | None, bar: Bar
) -> tuple[dict[str, QuantizedWeight], Routing, dict[str, str]]:
    """(each weight on planes by its module's name, how often experts were met, the weights with too few inputs)."""
    collector = calibration.collector
    rounded: dict[str, QuantizedWeight] = {}
    routing: Routing | None = None
    few: dict[str, str] = {}
    for whole_part in calibration.parts():
        part = [entry for entry in whole_part if calibration.owns(entry)]
        met = routing = routing or Routing(model, collector)

        def one(entry: QuantizableWeight, met: Routing = met) -> QuantizedWeight:
            return round_and_score(entry, [collector.by_module[name] for name in entry.names], met, group, exact)

        sizes = [float(weight_work(entry)) for entry in part]
        for entry, made in bar.track(ROUNDING, in_parallel(one, part), sizes=sizes):
            seen = [collector.by_module[name] for name in entry.names]
            if saw_too_little(seen):
                rows, columns = rows_of_covariances(seen), weight_matrix_shape(entry.modules[0])[1]
                few[entry.names[0]] = f"{entry.names[0]} ({rows:.0f} rows, {columns} columns)"
            rounded[entry.names[0]] = made
            calibration.done(entry)
        for entry in whole_part:
            calibration.done(entry)
    assert routing is not None
    if calibration.processes.shared:
        rounded = exchanged(rounded, calibration.found, calibration.owner, calibration.processes)
        few = {name: text for said in calibration.processes.told(few) for name, text in said.items()}
    return rounded, routing, {e.names[0]: few[e.names[0]] for e in calibration.found if e.names[0] in few}


def _notes(calibration: Calibration, routing: Routing, few: Mapping[str, str], guessed: bool) -> list[str]:
    """What the user should know of the calibration, one sentence each."""
    collector = calibration.collector
    notes = routing.notes()
    unseen = set(collector.unseen())
    blind = [e.names[0] for e in calibration.found if unseen >= set(e.names) and e.names[0] not in routing]
    if blind:
        notes.append(f"calibration never reached {listed(blind)}: their bits are chosen blindly")
    if guessed and collector.objective.name == "embedding":
        notes.append("the output has no `logits`, so it is taken for an embedding; if it is logits, say Logits()")
    if few:
        notes.append(
            f"{listed(list(few.values()))} had fewer rows of input than columns: rounded to nearest, since descent "
            "would fit those few rows; calibrate on at least as many tokens, positions or samples as there are columns"
        )
    return notes
