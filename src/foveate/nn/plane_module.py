"""PlaneModule: the base of all modules on planes. It has a weight on planes, and the level and range of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.collect.kinds import Kind
from foveate.nn.weight import PlaneWeight
from foveate.planes import multiplied

NO_BIAS = torch.empty(0)


@dataclass(frozen=True, eq=False)
class Origin:
    """What `foveate.dequantize` needs to know of the module that a plane module replaced.

    Attributes:
        module: a copy of that module without its weight.
        kind: how the module uses its weight.
        requires_grad: whether the weight was trained.
    """

    module: nn.Module
    kind: Kind
    requires_grad: bool


class PlaneModule(nn.Module):
    """The base of the modules on planes: a weight, and the level and range of its input.

    Attributes:
        weight: the weight on planes.
        input_level: uint8 [1], the level of the input in the map that was published last.
        input_range: float32 [2], the range of a static scale of the input; zeros where each row has its own scale.
        input_place: the number of its input in its model.
        origin: the module that this one replaced; set by `foveate.nn.modules.on_planes`.
    """

    weight: PlaneWeight
    input_level: Tensor
    input_range: Tensor
    origin: Origin

    def __init__(self, weight: PlaneWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else _as_float32(bias)
        self.register_buffer("input_level", torch.full((1,), 8, dtype=torch.uint8), persistent=False)
        # zeros: each row of the input has a scale of its own
        self.register_buffer("input_range", torch.zeros(2, dtype=torch.float32), persistent=False)
        self.input_place = 0

    def _needs_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def _product(self, x: Tensor, owners: Tensor | None = None) -> Tensor:
        bias = NO_BIAS if self.bias is None else self.bias.float()
        tensors, maps = self.weight.read(x, 1, owners)
        level, limits = self.input_level, self.input_range
        if self.weight.passes is not None and maps is not None:
            book, places = self.weight.passes.book, [self.weight.place, self.input_place]
            level, limits = torch.ops.foveate.pass_input(book, self.input_place)
            given = x.float() if x.dtype == torch.float64 else x
            maps = torch.ops.foveate.pass_choice(
                book, places, given.detach(), tensors, self.weight.value.geometry, maps
            )
        return multiplied(x, tensors, self.weight.value.geometry, [bias], level, maps, input_range=limits)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneModule:
        level, limits = self.input_level, self.input_range
        nn.Module._apply(self, fn, recurse)
        self.input_level, self.input_range = level, limits  # views of blocks of the registry
        return self


def _as_float32(bias: Tensor) -> nn.Parameter:
    """The bias in float32: the very parameter if it is one in float32, since other modules may share it."""
    if isinstance(bias, nn.Parameter) and bias.dtype == torch.float32:
        return bias
    return nn.Parameter(bias.detach().float(), requires_grad=bias.requires_grad)
