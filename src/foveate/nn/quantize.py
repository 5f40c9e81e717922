"""quantize: put a model on planes, in place, and measure what every plane is worth.

    find weights -> one pass over the data (statistics) -> for each weight: round, pack, score -> exchange the modules
    -> Profile

The pass over the data is the long part, and can be resumed. After it one weight at a time is float and planes at once,
so the peak is the model, its planes, and the largest weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.collect.kinds import Found, Kind, find_weights, weight_matrix
from foveate.collect.objectives import Custom, Objective, infer, run
from foveate.collect.statistics import Collector, Factored, WeightStatistics
from foveate.errors import DataError, SiteError, WeightError
from foveate.formats.levels import TOP_LEVEL
from foveate.formats.packing import GROUPS, check_group
from foveate.kernels.dispatch import ensure_loaded
from foveate.maps import Profile, Site
from foveate.nn.experts import left_notes, merged, taken_apart
from foveate.nn.install import install, site_of
from foveate.nn.modules import PlaneModule, PlaneWeight
from foveate.nn.routing import Routing
from foveate.planes import PlaneTensor, from_codes, gathered
from foveate.progress import track
from foveate.rounding import round_weight, with_feedback
from foveate.rounding.feedback import SHORTFALL, SHORTFALL_LOOKED_UP
from foveate.sensitivity import tile_losses

_SAVE_EVERY = 16  # batches between two writes of the resume file
#: Share of the free memory that covariances of inputs may take; weights beyond it are rounded without error feedback.
_COVARIANCE_SHARE = 0.25


def group_for(columns: int) -> int:
    """Inputs a group: of 32, 64 and 128 the one that stores a row in the fewest bytes at 4 bits, scales and padding
    counted.

    At equal bytes it also has the least error (docs/decisions.md).
    """
    return min(GROUPS, key=lambda group: (-(-columns // group) * (group * 4 + 16), group))


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    objective: Objective | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    group: int | None = None,
    skip: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Profile:
    """Store every weight of a model as bit planes, in place, and measure what each tile is worth at each level.

    Linear layers, transformers' Conv1D, embeddings and convolutions are exchanged for their `foveate.nn` counterparts;
    tied weights stay one weight, and the experts of transformers' mixtures become weights of their own. Afterwards
    every weight is read at 8 bits.

    Args:
        model: any module, in memory, on the CPU.
        batches: a small data set: mappings are passed to the model as keywords, tuples as positions, anything else as
            the one argument.
        objective: what the output is for, `foveate.Logits()` or `foveate.Embedding()`; found out from the first output
            if not given (one with a `logits` attribute is `Logits`).
        loss: `loss(output, batch)`, a sum over the samples of the batch whose increase is to be kept small, instead of
            the objective's own.
        group: inputs a group, 32, 64 or 128, for every weight; chosen by width if not given.
        skip: shell patterns of module names to leave as they are.
        resume: a file that keeps the statistics as they grow; if it exists, the batches it has seen are skipped. It is
            deleted at the end.
        progress: whether to show how far it is.

    Returns:
        The profile: sites, and the loss of every tile at every level.

    Raises:
        DataError: no batches, or a loss that is not finite.
        WeightError: a weight holds NaN or Inf, or no weight can be quantized. The model is then unchanged.
        SiteError: a pattern in `skip` matches nothing.
    """
    ensure_loaded()
    with taken_apart(model):
        return _quantized(model, batches, objective, loss, group, skip, Path(resume) if resume else None, progress)


def _quantized(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None,
    loss: Callable[[Any, Any], Tensor] | None,
    group: int | None,
    skip: Sequence[str],
    resume: Path | None,
    progress: bool,
) -> Profile:
    if objective is not None and not isinstance(objective, Objective):
        raise DataError(f"objective (={objective!r}) is not an Objective, such as foveate.Logits()")
    found, notes = _chosen(model, skip)
    for entry in found:
        weight = cast(Tensor, entry.modules[0].weight)
        if weight.device.type != "cpu":
            raise WeightError(f"{entry.names[0]}.weight is on {weight.device}: load the model on the CPU")
        if not bool(torch.isfinite(weight).all()):
            raise WeightError(f"{entry.names[0]}.weight holds NaN or Inf")
    collector = _collect(model, batches, found, objective, loss, resume, progress)
    routing = Routing(model, collector)
    notes += routing.notes()
    unseen = [name for name in collector.unseen() if name not in routing]
    if unseen:
        listed = ", ".join(unseen[:5]) + (" and others" if len(unseen) > 5 else "")
        notes.append(f"calibration never reached {listed}: their bits are chosen blindly")
    if objective is None and collector.objective.name == "embedding":
        notes.append("the output has no `logits`, so it is taken for an embedding; if it is logits, say Logits()")
    if collector.without_covariance:
        count = len(collector.without_covariance)
        notes.append(f"{count} weights were rounded without error feedback, for want of memory for their covariances")
    few = [f.names[0] for f in found if _saw_too_little([collector.by_module[name] for name in f.names])]
    if few:
        listed = ", ".join(few[:5]) + (" and others" if len(few) > 5 else "")
        notes.append(
            f"{listed} had fewer rows of input than columns: rounded to nearest, for feedback would fit those few rows"
        )

    sites: list[Site] = []
    losses: dict[str, Tensor] = {}
    statistics: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, PlaneWeight] = {}
    for entry in track(found, "rounding", show=progress):
        seen = [collector.by_module[name] for name in entry.names]
        w_NK = weight_matrix(entry.modules[0])
        planes = _on_planes(entry, w_NK, seen, group)
        site = site_of(entry, planes, routing.share(entry.names[0]))
        sites.append(site)
        fishers = [routing.fisher(name) for name in entry.names]
        losses[site.name] = _losses(
            w_NK, planes, fishers, [s.covariance() for s in seen], [s.gradients() for s in seen]
        )
        statistics[site.name] = {**_kept_statistics(seen[0], planes), **routing.statistics(entry.names[0])}
        weights[site.name] = PlaneWeight(planes, cast(Tensor, entry.modules[0].weight).dtype)
    for kept, value in zip(weights.values(), gathered([w.value for w in weights.values()]), strict=True):
        kept.set(value)
    registry = install(model, found, sites, weights)
    for name in registry.inputs:
        node = collector.by_module.get(name.removesuffix(":input"))
        if node is not None and node.inputs is not None:
            if float(node.tensors["rows"]):  # what was never seen is not free
                losses[name] = node.inputs.losses(collector.samples)
            statistics[name] = node.inputs.summary(collector.samples)
    if resume:
        resume.unlink(missing_ok=True)
    profile = Profile(
        registry.sites,
        losses,
        registry.other_bytes,
        collector.samples,
        collector.objective.name,
        statistics,
        tuple(notes),
    )
    registry.profile = profile
    top = profile.uniform(TOP_LEVEL)
    registry.apply(top, top)
    return profile


def _chosen(model: nn.Module, skip: Sequence[str]) -> tuple[list[Found], list[str]]:
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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients, put back afterwards."""
    modes = {m: m.training for m in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def _collect(
    model: nn.Module,
    batches: Iterable[Any],
    found: list[Found],
    objective: Objective | None,
    loss: Callable[[Any, Any], Tensor] | None,
    resume: Path | None,
    progress: bool,
) -> Collector:
    collector: Collector | None = None
    done = 0
    with _frozen(model):
        for index, batch in enumerate(track(batches, "calibrating", show=progress)):
            if collector is None:
                if objective is None:
                    with torch.no_grad():
                        objective = infer(run(model, batch))
                if loss is not None:
                    objective = Custom(loss, objective)
                state = _read_resume(resume) if resume is not None and resume.exists() else None
                # going on keeps the covariances that were begun, whatever memory is free now
                room = int(_COVARIANCE_SHARE * psutil.virtual_memory().available)
                if state is not None:
                    room = sum(
                        t.numel() * 4 for key, t in state.items() if key.endswith(("|covariance_KK", "|gradients_BRR"))
                    )
                collector = Collector(found, objective, covariance_bytes=room)
                if state is not None:
                    collector.restore(state)
                    done = collector.batches
            if index < done:
                continue
            collector.add(model, batch)
            if resume is not None and collector.batches % _SAVE_EVERY == 0:
                _write_resume(resume, collector)
    if collector is None:
        raise DataError("there are no batches to calibrate on")
    return collector


def _read_resume(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"the resume file {path} cannot be read ({error}): delete it to start afresh") from error


def _write_resume(path: Path, collector: Collector) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({k: t.contiguous() for k, t in collector.state().items()}, temporary)
    os.replace(temporary, path)


def _on_planes(entry: Found, w_NK: Tensor, seen: Sequence[WeightStatistics], group: int | None) -> PlaneTensor:
    """Round and pack one weight."""
    size = check_group(group) if group is not None else group_for(w_NK.shape[1])
    energies = [e for e in (s.input_energy() for s in seen if float(s.tensors["rows"])) if e is not None]
    if energies:
        energy: Tensor | None = torch.stack(energies).sum(0)
    else:
        columns = seen[0].tensors.get("gradient_K")
        energy = columns.float() if columns is not None and bool(columns.any()) else None
    try:
        rounded = round_weight(w_NK, group=size, input_energy_K=energy)
    except WeightError as error:
        raise WeightError(f"{entry.names[0]}: {error}") from error
    covariances = [c for c in (s.covariance() for s in seen) if c is not None]
    if covariances and not _saw_too_little(seen):
        covariance = torch.stack(covariances).sum(0) if covariances[1:] else covariances[0]
        looked_up = any(s.kind is Kind.EMBEDDING for s in seen)
        shortfall = SHORTFALL_LOOKED_UP if looked_up else SHORTFALL
        rounded = with_feedback(w_NK, rounded, covariance, _gradients(seen), shortfall=shortfall)
    return from_codes(
        rounded.anchor, rounded.residual, rounded.scale, rounded.offset, rounded.gain, group=size, reach=rounded.reach
    )


def _gradients(seen: Sequence[WeightStatistics]) -> Tensor | None:
    """How the gradients of a weight's outputs hang together, over its uses."""
    kept = [g for g in (s.gradients() for s in seen) if g is not None]
    return torch.stack(kept).sum(0) if kept else None


def _saw_too_little(seen: Sequence[WeightStatistics]) -> bool:
    """Whether a weight's covariance is of fewer rows than it has columns."""
    with_one = [s.tensors for s in seen if "covariance_KK" in s.tensors]
    return bool(with_one) and 0 < sum(float(t["rows"]) for t in with_one) < len(with_one[0]["energy_K"])


def _losses(
    w_NK: Tensor,
    planes: PlaneTensor,
    fishers: Sequence[Tensor | Factored],
    covariances: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> Tensor:
    def at_level(level: int) -> Tensor:
        planes.tags.fill_(level)
        return planes.dequantize()

    table = tile_losses(w_NK, at_level, fishers, planes.group, covariances, gradients)
    planes.tags.fill_(TOP_LEVEL)
    return table


def _kept_statistics(seen: WeightStatistics, planes: PlaneTensor) -> dict[str, Tensor]:
    kept = {"output_range": seen.tensors["output_range"].float()}
    energy = seen.input_energy()
    if energy is not None:
        padded = torch.nn.functional.pad(energy, (0, -planes.columns % planes.group))
        kept["input_energy"] = padded.view(-1, planes.group).mean(1)
    return kept
