"""The first run on planes, before a quantized model is handed back, and the way back to floats where it fails.

What a model's code does with a module beyond calling it cannot be known but by running it: it may ask for an attribute
that only the original has, or hand a weight to a function that was scripted. So the model runs once on planes while the
original modules are still there, and generates, if it does. If that fails the original modules are put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import frozen
from foveate.collect.kinds import QuantizableWeight, listed
from foveate.collect.objectives import run
from foveate.collect.reads import decode, running
from foveate.errors import WeightError
from foveate.nn.registry import detach
from foveate.nn.replace import replace_module


def run_on_planes(model: nn.Module, batch: Any, generates: bool) -> None:
    """Run a model that was just put on planes on a batch, and let it generate if it did as floats."""
    with frozen(model), torch.no_grad():
        run(model, batch)
        if generates:
            decode(model)


class OriginalModules:
    """The modules that are about to be exchanged, and where they are."""

    def __init__(self, model: nn.Module, found: Sequence[QuantizableWeight]) -> None:
        ours = {id(module) for entry in found for module in entry.modules}
        named = model.named_modules(remove_duplicate=False)
        self._model = model
        self._places = [(name, module) for name, module in named if id(module) in ours]

    @contextmanager
    def restored_on(self, kind: type[BaseException]) -> Iterator[None]:
        """Put the modules back if an error of this kind is raised.

        Raises:
            WeightError: in place of an `Exception`, with the name of the module that it came from.
        """
        try:
            yield
        except kind as error:
            where = running(self._model, error)
            gone = [name for name, module in self._places if isinstance(w := module.weight, Tensor) and w.is_meta]
            if not gone:
                for name, module in self._places:
                    replace_module(self._model, name, module)
                detach(self._model)
            if not isinstance(error, Exception):
                raise
            state = (
                f"the float weights of {listed(gone)} had to make room (memory), so it stays on planes: load it again"
                if gone
                else "it is as it was"
            )
            raise WeightError(
                f"the model does not run on planes: {where}: {error or repr(error)}. Name the weights that it uses in "
                f"skip; {state}"
            ) from error
