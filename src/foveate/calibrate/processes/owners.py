"""Which process rounds which weight, and how all of them get what each has rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from foveate.calibrate.one_weight import QuantizedWeight
from foveate.calibrate.parallel import weight_work
from foveate.calibrate.processes.group import Processes
from foveate.collect.kinds import QuantizableWeight
from foveate.nn.experts import PlaneExperts
from foveate.planes import ExactTiles, PlaneTensor
from foveate.precision.maps import Site


def owners(model: nn.Module, found: Sequence[QuantizableWeight], count: int) -> dict[str, int]:
    """The process that rounds each weight, by the names of its modules: all have about the same work.

    One projection of all experts of a layer goes to one process, since experts that were never met are treated as the
    average of the others.

    Args:
        model: its experts are taken apart.
        found: the weights.
        count: how many processes there are.
    """
    mixtures = [name for name, module in model.named_modules() if isinstance(module, PlaneExperts)]
    together: dict[str, list[QuantizableWeight]] = {}
    for entry in found:
        name = entry.names[0]
        layer = next((m for m in mixtures if name.startswith(f"{m}.")), None)
        together.setdefault(name if layer is None else f"{layer}.*.{name.rpartition('.')[2]}", []).append(entry)
    work = [0] * count
    owner: dict[str, int] = {}
    for entries in sorted(together.values(), key=lambda entries: -sum(map(weight_work, entries))):
        least = work.index(min(work))
        work[least] += sum(map(weight_work, entries))
        owner.update({name: least for entry in entries for name in entry.names})
    return owner


def exchanged(
    rounded: Mapping[str, QuantizedWeight],
    found: Sequence[QuantizableWeight],
    owner: Mapping[str, int],
    processes: Processes,
) -> dict[str, QuantizedWeight]:
    """All weights by the first name of their modules, given those that this process has rounded."""
    everything = {}
    for entry in found:
        name = entry.names[0]
        mine = rounded.get(name)
        sent = processes.sent(None if mine is None else _plain(mine), owner[name])
        everything[name] = _weight(sent) if mine is None else mine
    return everything


def _plain(weight: QuantizedWeight) -> dict[str, Any]:
    """A weight as tensors, numbers and text."""
    exact = weight.planes.exact
    return {
        "site": _given(weight.site),
        "planes": {**_given(weight.planes), "exact": None if exact is None else _given(exact)},
        "dtype": weight.dtype,
        "losses": weight.losses,
        "statistics": weight.statistics,
    }


def _given(value: Any) -> dict[str, Any]:
    """The fields that a dataclass is made from."""
    return {f.name: getattr(value, f.name) for f in fields(value) if f.init}


def _weight(plain: Mapping[str, Any]) -> QuantizedWeight:
    planes = dict(plain["planes"])
    planes["exact"] = None if planes["exact"] is None else ExactTiles(**planes["exact"])
    return QuantizedWeight(
        Site(**plain["site"]), PlaneTensor(**planes), plain["dtype"], plain["losses"], plain["statistics"]
    )
