"""What inputs decide, seen from outside: for each product the estimated and the true error of each row of its input.

The estimates are those of the op itself, by the same kernels and samples (`foveate.kernels.planes.choice`). The true
error is the same sum over all outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.collect.kinds import patches
from foveate.errors import FoveateError
from foveate.formats.packing import TILE_ROWS
from foveate.inputs.gradients import products_of
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import registry_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """What one product did with its input.

    Attributes:
        site: the weight.
        input_site: its input.
        errors: float32 [M], the estimated loss that the lower map adds, for each row.
        true_errors: float32 [M], the same from all outputs; None if that was not asked for.
        threshold: above which a row reads the higher map.
        x: the rows that were multiplied, [..., K].
        limits: float32 [2], the static range of the input; zeros where each row has its own.
        rows: the shape that the rows have in the model, such as [batch, tokens].
    """

    site: str
    input_site: str
    errors: Tensor
    true_errors: Tensor | None
    threshold: float
    x: Tensor
    limits: Tensor
    rows: torch.Size

    @property
    def takes_high(self) -> Tensor:
        """Whether each row reads the higher map, bool [M]."""
        return ~(self.errors <= self.threshold)


@contextmanager
def observing(model: nn.Module, take: Callable[[Observed], None], *, true_errors: bool = False) -> Iterator[None]:
    """Within this context `take` is called with what every product of the model decides, for the default class of rows.

    Raises:
        FoveateError: inputs do not adapt, so there is nothing to decide.
    """
    registry = registry_of(model)
    composed = registry.generations.composed
    pair = None if composed is None else composed.pairs[0]
    if composed is None or pair is None or pair not in composed.choices:
        raise FoveateError("inputs of this model do not choose between maps: call foveate.adapt_to_input first")
    maps = list(pair)
    choice, ops, book = composed.choices[pair], torch.ops.foveate, registry.generations.book
    assert registry.generations.state is not None
    adaptation = registry.generations.state.adaptation
    assert adaptation is not None
    gradients = adaptation.estimator.gradients

    def hook(name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer = cast(PlaneModule, module)
            x = rows_of_input(layer, args[0] if args else kwargs["input"])
            weight = layer.weight
            tensors = (*weight.value.tensors[:-1], ops.pass_levels(book, weight.place, *weight.value.grid))
            level, limits = ops.pass_input(book, layer.input_place)

            def error(strips: Tensor, row_weights: Tensor) -> Tensor:
                found: Tensor = ops.plane_error(
                    x, tensors, weight.value.geometry, level, limits, maps, strips, row_weights
                )
                return found

            sample = choice.samples[weight.place]
            true = None
            if true_errors and weight.name in gradients:
                padded = F.pad(gradients[weight.name], (0, -weight.value.rows % TILE_ROWS))
                true = error(torch.arange(len(padded) // TILE_ROWS), 0.5 * padded.view(-1, TILE_ROWS))
            take(
                Observed(
                    site=weight.name,
                    input_site=name,
                    errors=error(sample.strips, sample.row_weights),
                    true_errors=true,
                    threshold=choice.thresholds[weight.place],
                    x=x,
                    limits=limits,
                    rows=x.shape[:-1],
                )
            )

        return observe

    hooks = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in products_of(model).items()
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def rows_of_input(module: PlaneModule, x: Tensor) -> Tensor:
    """The rows that a module multiplies, [..., K]: of a convolution the patches of its input."""
    if hasattr(module, "kernel_size"):
        x = patches(cast(nn.Conv2d, module), x)[:, 0].transpose(1, 2)
    return x.detach().float() if x.dtype == torch.float64 else x.detach()
