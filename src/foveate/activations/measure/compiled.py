"""What functions made by `torch.compile` keep for backward: anonymous values that a store can only keep as they are.

AOTAutograd traces forward and backward together and decides itself what goes from one to the other. It is saved by one
autograd node, `CompiledFunctionBackward`, without a name, without the function that needs it and without knowing
whether its backward is linear in it, so nothing of it is rounded. The node is seen when backward asks for its tensors,
whatever was compiled: a model, one of its modules, or a function.
"""

from __future__ import annotations

import warnings

import torch

from foveate.activations.measure.steps import Step
from foveate.activations.policy.choose import LEVELS
from foveate.activations.policy.options import Settings
from foveate.sizes import format_bytes

#: The autograd node of a compiled function, by its name.
_NODE = "CompiledFunctionBackward"
#: A warning is given where compiled functions hold at least so much of what plain training would hold.
_SHARE = 0.1


def note_reader(step: Step, site: str) -> None:
    """Note in a step, while backward asks for a site's tensor, whether a compiled function does."""
    node = torch._C._current_autograd_node()
    if node is not None and node.name() == _NODE:
        step.compiled.add(site)


class CompiledParts:
    """Warns once where compiled functions hold much of what a store was to make small.

    Args:
        settings: the store's; where every level is exact nothing was to be rounded, and nothing is said.
    """

    def __init__(self, settings: Settings) -> None:
        self._silent = settings.levels is not None and set(settings.levels.values()) <= {LEVELS[-1]}

    def finished(self, step: Step) -> None:
        """A step is over."""
        held = step.held_compiled
        if self._silent or held < _SHARE * step.original or not held:
            return
        self._silent = True
        warnings.warn(
            f"compress_activations cannot make smaller what compiled functions keep for backward: "
            f"{format_bytes(held)} of {format_bytes(step.original)} in this step. Train without torch.compile, or with "
            'torch.compile(..., backend="eager"), or enter torch.compiler.set_stance("force_eager") too: all three '
            "run the model uncompiled",
            RuntimeWarning,
            stacklevel=3,
        )
