"""resize: another limit for a model whose planes come and go; and what is in its memory."""

from __future__ import annotations

from torch import nn

from foveate.memory.report import MemoryReport
from foveate.nn.residency.attach import resident_registry
from foveate.nn.residency.following import limit_of
from foveate.precision.maps import PrecisionMap


def resize(model: nn.Module, *, memory: int | str, floor: PrecisionMap | int | None = None) -> None:
    """Have a model take at most so much memory from now on, while it is in use.

    With less memory, planes leave before this returns, and their pages go back to the system. With more, planes are
    fetched in the background, and the model reads them as they arrive. Either way changes are taken between two calls
    of the model: a call that is running is waited for.

        fv.resize(model, memory="4GiB")
        fv.resize(model, memory="auto", floor=4)  # follows what is free, and never reads less than 4 bits

    Args:
        model: a model that `foveate.load(path, memory=...)` gave.
        memory: bytes, as `"4GiB"` or a number, for all that belongs to the model; or `"auto"` for what is free, which
            is looked at once a second from then on.
        floor: the standing floor: levels that stay readable whatever the limit, a map or one level for all weights. It
            holds until another is given. None keeps the present one, which at first is 2 bits.

    Raises:
        BudgetError: `memory` is no size, or less than the standing floor needs; nothing was changed.
        FoveateError: all planes of the model are in memory (it was loaded without `memory=`), or this was called
            within a call of the model.
    """
    registry = resident_registry(model)
    registry.resize(limit_of(registry, memory), floor)


def memory_report(model: nn.Module) -> MemoryReport:
    """What a model has in memory and what it has not, and how often that was felt.

        print(fv.memory_report(model))

    Raises:
        FoveateError: all planes of the model are in memory.
    """
    return resident_registry(model).report()
