"""One weight: its codes are rounded, packed into planes, and scored at every level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from foveate.calibrate.routing import Routing
from foveate.collect.kinds import Kind, QuantizableWeight, weight_matrix
from foveate.collect.statistics import Factored, WeightStatistics
from foveate.errors import WeightError
from foveate.formats.levels import TOP_LEVEL
from foveate.formats.packing import GROUPS, TILE_ROWS, check_group
from foveate.nn.replace import site_of
from foveate.planes import PlaneTensor, from_codes
from foveate.precision.maps import Site
from foveate.precision.profiles import FITTED
from foveate.rounding import (
    DescentConfig,
    degrees_of_freedom,
    descent_config,
    overfit_factor,
    round_weight,
    with_descent,
)
from foveate.rounding.descent import INPUT_DAMPING, LEVEL_WEIGHTS_LOOKED_UP
from foveate.rounding.exact import KeepExact
from foveate.rounding.nearest import CLIP_PENALTIES
from foveate.sensitivity import tile_losses

#: How many values of a weight are scored at a time.
_SCORED = 1 << 22


def group_for(columns: int) -> int:
    """The group size, of 32, 64 and 128, that stores a row in the fewest bytes at 4 bits, scales and padding counted.

    At equal bytes this size also has the least error (docs/decisions.md).
    """
    return min(GROUPS, key=lambda group: (-(-columns // group) * (group * 4 + 16), group))


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight on planes, with its losses and statistics."""

    site: Site
    planes: PlaneTensor
    dtype: torch.dtype
    losses: Tensor
    statistics: dict[str, Tensor]


def round_and_score(
    entry: QuantizableWeight,
    seen: Sequence[WeightStatistics],
    routing: Routing,
    group: int | None,
    exact: KeepExact | None = None,
) -> QuantizedWeight:
    """Round one weight, pack it into planes, and measure what each tile costs at each level.

    Args:
        entry: the weight and the modules that hold it.
        seen: the statistics of each of these modules.
        routing: how often experts were met.
        group: inputs a group; chosen by width if not given.
        exact: which tiles keep their exact values; None if none do.
    """
    w_NK = weight_matrix(entry.modules[0])
    planes, overfit = _on_planes(entry, w_NK, seen, group, routing.samples)
    fishers = [routing.fisher(name) for name in entry.names]
    covariances, gradients = [s.covariance() for s in seen], [s.gradients() for s in seen]
    losses, seen_sums = _losses(w_NK, planes, fishers, covariances, gradients, overfit or 1.0)
    kept = {**_kept_statistics(seen, planes), **routing.statistics(entry.names[0])}
    if overfit is not None:
        kept[FITTED] = (losses.double().sum(0) / seen_sums).nan_to_num(1.0, 1.0).float()
    dtype = cast(Tensor, entry.modules[0].weight).dtype
    if exact is not None:
        together = planes.grid[1] if overfit is not None else 1
        planes = replace(planes, exact=exact.candidates(w_NK, dtype, losses, planes.group, together))
    return QuantizedWeight(
        site_of(entry, planes, routing.share(entry.names[0])),
        planes,
        dtype,
        losses,
        kept,
    )


def _on_planes(
    entry: QuantizableWeight, w_NK: Tensor, seen: Sequence[WeightStatistics], group: int | None, samples: int
) -> tuple[PlaneTensor, float | None]:
    """Round and pack one weight.

    Returns:
        (the planes, the overfit factor if the codes were fitted to the data, else None).
    """
    size = check_group(group) if group is not None else group_for(w_NK.shape[1])
    energies = [e for e in (s.input_energy() for s in seen if float(s.tensors["rows"])) if e is not None]
    if energies:
        energy: Tensor | None = torch.stack(energies).sum(0)
    else:
        columns = seen[0].tensors.get("gradient_K")
        energy = columns.float() if columns is not None and bool(columns.any()) else None
    covariances = [c for c in (s.covariance() for s in seen) if c is not None]
    config, overfit, covariance = DescentConfig(LEVEL_WEIGHTS_LOOKED_UP, CLIP_PENALTIES, INPUT_DAMPING, 0), None, None
    if covariances and not saw_too_little(seen):
        covariance = torch.stack(covariances).sum(0) if covariances[1:] else covariances[0]
        dof_per_row = degrees_of_freedom(covariance, rows_of_covariances(seen))
        overfit = overfit_factor(dof_per_row)
        if not any(s.kind is Kind.EMBEDDING for s in seen):
            config = descent_config(dof_per_row, samples)
    try:
        rounded = round_weight(w_NK, group=size, input_energy_K=energy, clip_penalties=config.clip_penalties)
    except WeightError as error:
        raise WeightError(f"{entry.names[0]}: {error}") from error
    if covariance is not None:
        rounded = with_descent(
            w_NK,
            rounded,
            covariance,
            _gradients(seen),
            level_weights=config.level_weights,
            damping=config.damping,
            reach=config.reach,
        )
    planes = from_codes(
        rounded.anchor, rounded.residual, rounded.scale, rounded.offset, rounded.gain, group=size, reach=rounded.reach
    )
    return planes, overfit


def _gradients(seen: Sequence[WeightStatistics]) -> Tensor | None:
    """The covariance of the gradients of a weight's outputs, summed over its uses."""
    kept = [g for g in (s.gradients() for s in seen) if g is not None]
    return torch.stack(kept).sum(0) if kept else None


def saw_too_little(seen: Sequence[WeightStatistics]) -> bool:
    """Whether the covariance of a weight's inputs was taken from fewer rows than it has columns."""
    with_one = [s.tensors for s in seen if "covariance_KK" in s.tensors]
    return bool(with_one) and 0 < rows_of_covariances(seen) < len(with_one[0]["energy_K"])


def rows_of_covariances(seen: Sequence[WeightStatistics]) -> float:
    """How many rows of input the covariances of a weight's uses were taken from."""
    return sum(float(s.tensors["covariance_rows"][1]) for s in seen if "covariance_KK" in s.tensors)


def _losses(
    w_NK: Tensor,
    planes: PlaneTensor,
    fishers: Sequence[Tensor | Factored],
    covariances: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    overfit: float,
) -> tuple[Tensor, Tensor]:
    """(losses of a weight's tiles, their sums on the inputs that were seen), computed for some rows at a time."""
    parts = []
    seen_sums = torch.zeros((), dtype=torch.float64)
    # blocks of the gradients' covariance are not cut
    whole = math.lcm(TILE_ROWS, *(g.shape[1] for g in gradients if g is not None))
    step = max(whole, _SCORED // w_NK.shape[1] // whole * whole)
    for start in range(0, len(w_NK), step):
        rows = torch.arange(start, min(start + step, len(w_NK)))

        def at_level(level: int, rows: Tensor = rows) -> Tensor:
            planes.active_levels.fill_(level)
            dense: Tensor = torch.ops.foveate.plane_embedding(rows, planes.tensors, planes.geometry, None)
            return dense

        here = [
            f[start : start + step]
            if isinstance(f, Tensor)
            else Factored(f.gradient_N[start : start + step], f.energy_K)
            for f in fishers
        ]
        blocks = [None if g is None else g[start // g.shape[1] : -(-(start + step) // g.shape[1])] for g in gradients]
        w_rows = w_NK[start : start + step]
        part, seen = tile_losses(w_rows, at_level, here, planes.group, covariances, blocks, overfit)
        parts.append(part)
        seen_sums = seen_sums + seen
    planes.active_levels.fill_(TOP_LEVEL)
    return torch.cat(parts), seen_sums


def _kept_statistics(seen: Sequence[WeightStatistics], planes: PlaneTensor) -> dict[str, Tensor]:
    """The statistics that a profile keeps of a weight and all its uses (see `foveate.Profile`)."""
    ranges = torch.stack([s.tensors["output_range"].float() for s in seen])
    kept = {"output_range": torch.stack([ranges[:, 0].min(), ranges[:, 1].max()])}
    rows = sum(float(s.tensors["rows"]) for s in seen if "energy_K" in s.tensors)
    totals = [s.tensors["energy_K"] for s in seen if "energy_K" in s.tensors]
    if totals:
        energy_K = (torch.stack(totals).sum(0) / max(rows, 1.0)).float()
        padded = torch.nn.functional.pad(energy_K, (0, -planes.columns % planes.group))
        kept["input_energy"] = padded.view(-1, planes.group).mean(1)
    looked_up = [s.tensors["frequency_N"] for s in seen if "frequency_N" in s.tensors]
    if looked_up:
        frequency_N = torch.stack(looked_up).sum(0)
        strips = torch.nn.functional.pad(frequency_N, (0, -planes.rows % TILE_ROWS)).view(-1, TILE_ROWS).sum(1)
        kept["row_frequency"] = (strips / frequency_N.sum().clamp_min(1)).float()
    return kept
