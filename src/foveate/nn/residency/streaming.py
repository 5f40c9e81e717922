"""Streaming: a map that does not fit in memory is read all the same, layer by layer, from disk (`strict=True`).

Some runs stay in memory. The others come just before the layer that reads them, and leave after it. While a layer
computes, those of the next layers are on their way, as far as the window has room: the mover is told the order in which
the last call used the layers. So a call takes as long as reading the missing bytes, and reads exactly the map in force.

All layers that share an input are computed at the first of them (`foveate.nn.fused_group`), so they come together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.errors import BudgetError
from foveate.memory.streaming import StreamingResidency
from foveate.nn.modules import PlaneLinear
from foveate.nn.plane_module import PlaneModule
from foveate.nn.residency.pass_gate import EagerHook
from foveate.sizes import format_bytes

#: How many times the largest group the window has room for, if there is room for so much.
_WINDOW = 4


class Streaming:
    """Brings the planes of each group of layers before it is computed, and lets them go afterwards.

    Attributes:
        keep: the runs that stay.
        window: bytes for those that do not.
    """

    def __init__(
        self,
        layers: Iterable[PlaneModule],
        residency: StreamingResidency,
        needed: frozenset[int],
        publish: Callable[[str, Tensor], None],
    ) -> None:
        """Choose what stays, and put hooks on the layers.

        Args:
            layers: the modules on planes.
            residency: the runs.
            needed: the runs that the map in force reads, with all that those need.
            publish: called with a weight's name and its caps, [NT], before a layer reads it and before runs leave.

        Raises:
            BudgetError: the planes of one group of layers do not fit beside what always stays.
        """
        self._residency, self._publish = residency, publish
        held = residency.held
        self._groups: list[tuple[str, ...]] = []
        self._group_of: dict[int, int] = {}
        known: dict[frozenset[str], int] = {}
        layers = tuple(layers)
        for module in layers:
            names = frozenset(m.weight.name for m in _together(module))
            number = known.setdefault(names, len(self._groups))
            if number == len(self._groups):
                self._groups.append(tuple(sorted(names)))
            self._group_of[id(module)] = number
        sizes = [self._bytes_of(number, needed, residency.floor) for number in range(len(self._groups))]
        largest = max(sizes, default=0)
        free = residency.room - sum(held.runs[n].size for n in residency.floor)
        if largest > free:
            raise BudgetError(
                f"the planes of {', '.join(self._groups[sizes.index(largest)])} need {format_bytes(largest)}, and "
                f"{format_bytes(free)} are left beside what always stays: give more memory, or apply a smaller map"
            )
        self.window = min(_WINDOW * largest, max(largest, free // 2))
        self.keep = residency.best_within(needed, residency.room - self.window)
        self._missing = [
            [n for name in names for n in held.of_weight[name] if n in needed and n not in self.keep]
            for names in self._groups
        ]
        self._order = list(range(len(self._groups)))
        self._used: list[int] = []
        self._here: list[int] = []  # groups whose runs are here or on their way, in the order in which they are used
        self._urgency = 0.0
        self._now: int | None = None
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(EagerHook(self._before)) for module in layers
        ]

    def _bytes_of(self, group: int, needed: frozenset[int], floor: frozenset[int]) -> int:
        held = self._residency.held
        runs = [n for name in self._groups[group] for n in held.of_weight[name]]
        return sum(held.runs[n].size for n in runs if n in needed and n not in floor)

    def begin_pass(self) -> None:
        """A call of the model begins."""
        if self._used and self._used != self._order:
            self._order = list(self._used)
        self._used = []

    def end(self) -> None:
        """Take the hooks off, and let go of what was brought."""
        for hook in self._hooks:
            hook.remove()
        for group in list(self._here):
            self._let_go(group)

    def _before(self, module: nn.Module, args: Any) -> None:
        group = self._group_of[id(module)]
        if group == self._now:
            return
        if self._now is not None and self._now in self._here:
            self._let_go(self._now)
        self._now = group
        self._used.append(group)
        if group not in self._here:  # another order than the last call had
            for other in list(self._here):
                self._let_go(other)
            self._ask(group)
        self._ask_ahead(group)
        self._residency.settle(numbers=self._missing[group])
        for name in self._groups[group]:
            self._publish(name, self._residency.readable(name))

    def _ask(self, group: int) -> None:
        self._urgency += 1.0
        self._here.append(group)
        self._residency.bring(self._missing[group], self._urgency)

    def _ask_ahead(self, group: int) -> None:
        """Ask for the groups after this one, in the order of the last call, while there is room."""
        held = self._residency.held
        taken = sum(held.runs[n].size for g in self._here for n in self._missing[g])
        at = self._order.index(group) if group in self._order else 0
        for step in range(1, len(self._order)):
            following = self._order[(at + step) % len(self._order)]
            if following in self._here:
                continue
            size = sum(held.runs[n].size for n in self._missing[following])
            if taken + size > self.window:
                return
            taken += size
            self._ask(following)

    def _let_go(self, group: int) -> None:
        self._here.remove(group)
        for name in self._groups[group]:  # readers are told before the pages go
            self._publish(name, self._residency.caps[name])
        self._residency.drop(self._missing[group])


def _together(module: PlaneModule) -> list[PlaneModule]:
    """The modules whose weights one call reads."""
    group = module.fused_group if isinstance(module, PlaneLinear) else None
    layers = [] if group is None else [reference() for reference in group._layers]
    return [layer for layer in layers if layer is not None] or [module]
