"""PlaneModule: what all modules on planes share, a weight and the level and range of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.collect.kinds import Kind
from foveate.nn.weight import PlaneWeight
from foveate.planes import linear

NO_BIAS = torch.empty(0)


@dataclass(frozen=True, eq=False)
class Origin:
    """What `foveate.dequantize` needs of the module that a plane module replaced.

    Attributes:
        module: a copy of it without its weight.
        kind: how it uses its weight.
        requires_grad: of that weight.
    """

    module: nn.Module
    kind: Kind
    requires_grad: bool


class PlaneModule(nn.Module):
    """What the modules below share: a weight of planes, and the level and range of its input.

    Attributes:
        origin: the module that it replaced; set by `on_planes`.
    """

    weight: PlaneWeight
    input_level: Tensor
    input_range: Tensor
    origin: Origin

    def __init__(self, weight: PlaneWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else _as_float32(bias)
        self.register_buffer("input_level", torch.full((2,), 8, dtype=torch.uint8), persistent=False)
        # nothing but zero: each row of the input has a scale of its own
        self.register_buffer("input_range", torch.zeros(2), persistent=False)

    def _needs_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def _product(self, x: Tensor) -> Tensor:
        bias = NO_BIAS if self.bias is None else self.bias.float()
        return linear(x, [self.weight.value], [bias], self.input_level, input_range=self.input_range)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneModule:
        level, limits = self.input_level, self.input_range
        nn.Module._apply(self, fn, recurse)
        self.input_level, self.input_range = level, limits  # views that `foveate.apply` and others write through
        return self


def _as_float32(bias: Tensor) -> nn.Parameter:
    """The parameter itself where it can be, for others may share it."""
    if isinstance(bias, nn.Parameter) and bias.dtype == torch.float32:
        return bias
    return nn.Parameter(bias.detach().float(), requires_grad=bias.requires_grad)
