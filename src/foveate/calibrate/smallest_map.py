"""The smallest map of a model, from its shapes alone: a budget below it is refused before any work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from foveate.calibrate.one_weight import group_for
from foveate.calibrate.quantize import chosen
from foveate.collect.kinds import weight_matrix_shape
from foveate.errors import BudgetError
from foveate.formats.levels import NESTED_LEVELS
from foveate.nn.experts import taken_apart
from foveate.nn.foreign.derived import split_derived
from foveate.precision.budgets import Budget
from foveate.precision.maps import PrecisionMap, Site, uniform
from foveate.sizes import format_bytes


def widths_of(model: nn.Module, skip: Sequence[str] = ()) -> list[tuple[int, bool]]:
    """(the number of inputs, whether the weight is only an embedding) of each weight to quantize."""
    with taken_apart(model), split_derived(model):
        found, _ = chosen(model, skip)
        return [(weight_matrix_shape(entry.modules[0])[1], entry.is_embedding_only) for entry in found]


def smallest_map(model: nn.Module, *, group: int | None = None, skip: Sequence[str] = ()) -> PrecisionMap:
    """The map with every weight at the lowest level, without gains: no map of `foveate.allocate` takes less.

    Args:
        model, group, skip: as for `foveate.quantize`; the model is not changed.
    """
    with taken_apart(model), split_derived(model):
        found, _ = chosen(model, skip)
        sites = []
        for entry in found:
            rows, columns = weight_matrix_shape(entry.modules[0])
            sites.append(Site(f"{entry.names[0]}:weight", "weight", rows, columns, group or group_for(columns)))
        ours = {id(entry.modules[0].weight) for entry in found}
        rest = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in ours}
        other = sum(t.numel() * t.element_size() for t in rest.values())
    return uniform(sites, NESTED_LEVELS[0], other)


def check_reachable(model: nn.Module, budget: Budget, *, group: int | None = None, skip: Sequence[str] = ()) -> None:
    """Raise `BudgetError` for a budget of bytes or bits that no map can meet."""
    lowest = smallest_map(model, group=group, skip=skip)
    if isinstance(budget.bytes, int) and budget.bytes < lowest.bytes_resident:
        raise BudgetError(
            f"no map fits in {format_bytes(budget.bytes)}: the least is more than {format_bytes(lowest.bytes_resident)}"
        )
    if budget.bits is not None and budget.bits < lowest.bits:
        raise BudgetError(
            f"no map averages {budget.bits:g} bits a weight: the least possible is more than {lowest.bits:.2f} "
            "(scales and padding count)"
        )
