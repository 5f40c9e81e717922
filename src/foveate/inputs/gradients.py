"""The mean squared gradient of the loss by each output of each weight, measured on the quantized model.

The objective's loss has a random direction, so the squared gradient measures twice what a squared change of an output
adds to the divergence (`foveate.collect.objectives`). No labels are needed.

Shapes: M rows of inputs, N outputs of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import frozen
from foveate.collect.objectives import Objective, run
from foveate.errors import DataError
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import registry_of
from foveate.progress import track


@dataclass(frozen=True, kw_only=True)
class OutputGradients:
    """The sensitivity of a model's loss to the outputs of its weights.

    Attributes:
        squares: for the site of each weight that products read float32 [N], the mean over rows of the squared gradient.
        rows: for each of these weights how many rows of inputs it has for one sample.
    """

    squares: dict[str, Tensor]
    rows: dict[str, float]


def products_of(model: nn.Module) -> dict[str, PlaneModule]:
    """The modules of a quantized model that multiply inputs with planes, by the sites of their inputs. Convolutions in
    groups unpack their weight, and are left out.
    """
    found = registry_of(model).inputs
    return {name: module for name, module in found.items() if getattr(module, "groups", 1) == 1}


def output_gradients(
    model: nn.Module, batches: Sequence[Any], objective: Objective, *, seed: int = 0, progress: bool = True
) -> OutputGradients:
    """Run batches through a quantized model forward and backward, and average each output's squared gradient.

    Args:
        model: a quantized model. It is read at the levels in force.
        batches: data, as for `foveate.quantize`.
        objective: what should stay the same when precision falls.
        seed: of the random directions.
        progress: whether to show a progress bar.

    Raises:
        DataError: a gradient is not finite, or no output has any.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    generator = torch.Generator().manual_seed(seed)

    def hook(name: str, outputs: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def observe(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # a copy, for in-place operations on it are allowed
            y = output if output.requires_grad else output.detach().requires_grad_().clone()

            def add(gradient: Tensor) -> None:
                # of a convolution [B, N, ...]: outputs are the second dimension
                rows = gradient.transpose(1, -1) if hasattr(module, "kernel_size") else gradient
                g_MN = rows.reshape(-1, outputs).double()
                sums[name] = sums.get(name, torch.zeros(())) + g_MN.square().sum(0)
                counts[name] = counts.get(name, 0) + len(g_MN)

            y.register_hook(add)
            return y

        return observe

    modules = products_of(model).values()
    hooks = [module.register_forward_hook(hook(module.weight.name, module.weight.shape[0])) for module in modules]
    samples = 0
    try:
        with frozen(model), torch.enable_grad():
            for batch in track(batches, "measuring gradients", show=progress):
                loss, count = objective.loss(run(model, batch), batch, generator)
                loss.backward()
                samples += count
    finally:
        for one in hooks:
            one.remove()
    if not sums:
        raise DataError(
            "no output of a weight on planes has a gradient: no product was computed, or no batch was given"
        )
    squares = {name: (total / counts[name]).float() for name, total in sums.items()}
    for name, square_N in squares.items():
        if not bool(torch.isfinite(square_N).all()):
            raise DataError(f"the gradient of {name} is not finite: NaN or Inf in the data, or in the model")
    return OutputGradients(squares=squares, rows={name: max(n, 1) / samples for name, n in counts.items()})
