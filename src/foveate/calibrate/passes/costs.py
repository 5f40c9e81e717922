"""What each weight costs a calibration in memory, and what becomes of float weights that it needs no more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from foveate.calibrate.schedule import WeightCost
from foveate.collect.dry_run import DryRun
from foveate.collect.kinds import Kind, QuantizableWeight, kind_of, weight_matrix_shape
from foveate.collect.objectives import Objective
from foveate.collect.statistics import statistics_of


def weight_costs(found: Sequence[QuantizableWeight], objective: Objective, seen: DryRun) -> list[WeightCost]:
    """What each weight costs, by what the dry run showed."""
    place: dict[str, list[int]] = {}
    for i, name in enumerate(seen.calls):
        place.setdefault(name, []).append(i)
    costs = []
    for entry in found:
        weight = cast(Tensor, entry.modules[0].weight)
        each = [statistics_of(module, objective) for module in entry.modules]
        at = [i for name in entry.names for i in place.get(name, [])]
        rows, columns = weight_matrix_shape(entry.modules[0])
        costs.append(
            WeightCost(
                rows=rows,
                columns=columns,
                copied=weight.dtype != torch.float32 or kind_of(entry.modules[0]) is Kind.LINEAR_TRANSPOSED,
                float_bytes=weight.numel() * weight.element_size(),
                large_bytes=sum(s.large_bytes for s in each),
                gradients=any(s.needs_gradients for s in each),
                first_call=min(at, default=-1),
                last_call=max(at, default=len(seen.calls)),
                kept_bytes=sum(s.kept_bytes for s in each),
            )
        )
    return costs


def free_weight(entry: QuantizableWeight) -> None:
    """Free the memory of a float weight; its shape and dtype stay."""
    weight = cast(nn.Parameter, entry.modules[0].weight)
    if not weight.is_meta:
        empty = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        for module in entry.modules:
            module.weight = empty


def parts_of_resumed(
    found: Sequence[QuantizableWeight],
    costs: Sequence[WeightCost],
    parts: Sequence[list[QuantizableWeight]],
    keys: Collection[str],
) -> list[list[QuantizableWeight]]:
    """The parts of a calibration that is resumed from statistics with these names: the first pass keeps the weights
    whose large statistics it began.
    """
    begun = {key.rpartition("|")[0] for key in keys if key.endswith(("|covariance_KK", "|fisher_NK"))}
    first = [e for e, cost in zip(found, costs, strict=True) if not cost.large_bytes or begun & set(e.names)]
    rest = [[entry for entry in part if not any(entry is one for one in first)] for part in parts]
    return [first, *(part for part in rest if part)]
