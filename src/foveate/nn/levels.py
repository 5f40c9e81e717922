"""What users call to change the levels of a live model: `apply`, `use_static_scales`, and `current_map` to see them.

The levels themselves are written by `foveate.nn.registry.Registry.apply`, the only code that does.
"""

from __future__ import annotations

from torch import nn

from foveate.errors import FoveateError
from foveate.nn.registry import profile_of, registry_of
from foveate.precision.maps import PrecisionMap


def apply(model: nn.Module, plan: PrecisionMap, second: PrecisionMap | None = None) -> None:
    """Read the model at the levels of a map from the next call on.

    No plane is moved or repacked: one byte a tile is written, which takes microseconds, or milliseconds for billions of
    weights. A call that runs in another thread meanwhile may read some tiles at the old level and some at the new.

    Args:
        model: a quantized model.
        plan: the map.
        second: the map for those rows of inputs that choose it; `plan` if not given.

    Raises:
        SiteError: the map is of another model.
        PlaneNotResidentError: the map reads planes that are not stored, for they were not loaded or not kept; nothing
            was changed.
    """
    registry_of(model).apply(plan, plan if second is None else second)


def use_static_scales(model: nn.Module, on: bool = True) -> None:
    """Quantize inputs at levels 4 and 8 by the range that calibration saw at each input, not by each row's own.

    A static scale saves the search for each row's greatest value. The CPU's kernels gain no time by that; other
    machines do. Where rows differ, a static scale loses more than a scale for each row. It also clips values beyond
    the range that calibration saw, which `foveate.watch_inputs` detects. At levels 16 and 32 every row keeps its own
    scale. `foveate.save` stores the choice.

    Args:
        model: a quantized model, with its profile.
        on: False goes back to a scale for each row, which is the default.

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
    """The map in force: the first of the two where rows choose between two."""
    applied = registry_of(model).applied
    assert applied is not None
    return applied[0]
