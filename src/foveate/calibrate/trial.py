"""The first run on planes, before a quantized model is handed back; if it fails, the original modules are put back.

The code of a model may do more with a module than call it. It may ask for an attribute that only the original has, or
hand a weight to a scripted function. Only running the model shows that. So the model runs once on planes while the
original modules still exist, and generates, if it can. If that fails, the original modules are put back.
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
    """Run a model on planes on one batch, and let it generate if the float model did."""
    with frozen(model), torch.no_grad():
        run(model, batch)
        if generates:
            decode(model)


class OriginalModules:
    """The original modules that planes replace, and their places in the model."""

    def __init__(self, model: nn.Module, found: Sequence[QuantizableWeight]) -> None:
        ours = {id(module) for entry in found for module in entry.modules}
        named = model.named_modules(remove_duplicate=False)
        self._model = model
        self._places = [(name, module) for name, module in named if id(module) in ours]

    @contextmanager
    def restored_on(self, kind: type[BaseException]) -> Iterator[None]:
        """Put the original modules back if an error of this kind is raised.

        Raises:
            WeightError: in place of an `Exception`; the message names the module that raised it.
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
