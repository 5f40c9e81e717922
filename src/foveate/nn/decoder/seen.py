"""What modules and hooks a decoder's blocks have: what a fused call must find again."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from foveate.nn.experts import PlaneExperts
from foveate.nn.fused_group import CallScope
from foveate.nn.weight import PlaneWeight


class Seen:
    """The modules, parameters and hooks of some modules at one time. Parameters may be changed in place later."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        """
        Args:
            parts: the blocks, and the norm after them.
        """
        self._holders: list[dict[str, Any]] = []
        self._held: list[Any] = []
        self._hooks: list[dict[int, Any]] = []
        self._hooks_made = -1  # in the whole process, when no hook was found here that was not here before
        for part in parts:
            inside = _inside_experts(part)
            for module in part.modules():
                hooks = (module._forward_hooks, module._forward_pre_hooks)
                if isinstance(module, PlaneWeight) or (id(module) in inside and not any(hooks)):
                    continue
                for holder in (module._modules, module._parameters):
                    if holder:
                        self._holders.append(holder)
                        self._held += holder.values()
                self._hooks += hooks
        # those of fused groups, which a fused call does without
        self._hook_counts = [
            sum(isinstance(getattr(hook, "__self__", None), CallScope) for hook in hooks.values())
            for hooks in self._hooks
        ]

    def is_as_before(self) -> bool:
        """Whether the modules hold what they held, in the same order, and no hook was registered since."""
        # a thousand: loops in Python would be a tenth of a token's time
        now = list(itertools.chain.from_iterable(map(dict.values, self._holders)))
        if len(now) != len(self._held) or not all(map(operator.is_, now, self._held)):
            return False
        made = RemovableHandle.next_id  # counts the hooks of the process
        if made != self._hooks_made:
            if list(map(len, self._hooks)) != self._hook_counts:
                return False
            self._hooks_made = made
        return True


def _inside_experts(block: nn.Module) -> set[int]:
    """The modules within a block's experts, by id: thousands, at which no call looks again."""
    return {id(m) for layer in block.modules() if isinstance(layer, PlaneExperts) for m in layer.modules()} - {
        id(layer) for layer in block.modules() if isinstance(layer, PlaneExperts)
    }
