"""Tensors that functions made by `torch.compile` save for backward: a store can only keep them as they are.

AOTAutograd traces forward and backward together and decides itself which tensors backward gets. One autograd node,
`CompiledFunctionBackward`, saves them. It does not say which function needs a tensor, nor whether its backward is
linear in it, so none is rounded. The node is seen when backward asks for its tensors, whatever was compiled: a
model, one of its modules, or a function.
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
#: A warning is given where compiled functions hold at least this share of what plain training would hold.
_SHARE = 0.1


def note_compiled_reader(step: Step, site: str) -> None:
    """Note in a step, while backward asks for a site's tensor, whether it is a compiled function that asks."""
    node = torch._C._current_autograd_node()
    if node is not None and node.name() == _NODE:
        step.compiled.add(site)


class CompiledWarning:
    """Warns once if compiled functions hold a large share of what a store keeps.

    Args:
        settings: of the store. Where every level is 32 nothing would be rounded, and no warning is given.
    """

    def __init__(self, settings: Settings) -> None:
        self._silent = settings.levels is not None and set(settings.levels.values()) <= {LEVELS[-1]}

    def finished(self, step: Step) -> None:
        """Warn, if need be: a step is over."""
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
