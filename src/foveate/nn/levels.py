"""Where the levels of a live model change: the one place that writes them."""

from __future__ import annotations

from torch import nn

from foveate.errors import FoveateError
from foveate.nn.registry import profile_of, registry_of
from foveate.precision.maps import PrecisionMap


def apply(model: nn.Module, plan: PrecisionMap, second: PrecisionMap | None = None) -> None:
    """Read the model at the levels of a map from the next call on. Moves and repacks nothing: it writes a byte a tile,
    which takes microseconds, or milliseconds for billions of weights. A call that runs meanwhile in another thread may
    read some tiles at the old level and some at the new.

    Args:
        model: a quantized model.
        plan: the map.
        second: the map for rows of inputs that choose it; the same one if not given.

    Raises:
        SiteError: the map is of another model.
        PlaneNotResidentError: a level whose planes were not loaded or not kept; nothing was changed.
    """
    registry_of(model).apply(plan, plan if second is None else second)


def use_static_scales(model: nn.Module, on: bool = True) -> None:
    """Quantize inputs at levels 4 and 8 by the range that calibration saw at each node, not by each row's own.

    What a static scale saves is finding each row's greatest value, which the CPU's kernels do not notice; other
    machines do. It is worse than a scale a row wherever rows differ, and cuts off what calibration did not see:
    `foveate.watch_inputs` finds that out. At levels 16 and 32 every row keeps its own. A folder keeps the choice.

    Args:
        model: a quantized model, with its profile.
        on: False goes back to a scale for each row, which is what models begin with.

    Raises:
        FoveateError: the profile is missing, or was made by a foveate that did not measure inputs.
    """
    registry = registry_of(model)
    ranges: dict[str, tuple[float, float]] = {}
    if on:
        for name, kept in profile_of(model).statistics.items():
            if name in registry.inputs and "range" in kept:
                low, high = kept["range"].tolist()
                ranges[name] = (low, high)
        if registry.inputs and not ranges:
            raise FoveateError("the profile has no ranges of inputs: quantize the original again")
    registry.set_ranges(ranges)


def current_map(model: nn.Module) -> PrecisionMap:
    """The map in force."""
    applied = registry_of(model).applied
    assert applied is not None
    return applied[0]
