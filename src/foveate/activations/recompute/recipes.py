"""Tensors that need not be stored, because cheap functions of stored ones give them again.

    gate and up are stored                    ->  silu(gate) and silu(gate) * up are computed again
    x and its reciprocal deviation are stored ->  the output of the norm is computed again

Autograd saves the output of nearly every elementwise function beside its input. Of a gated layer's four wide tensors,
two determine the others. A `Recipe` is a function and its arguments: stored views, parameters, or other recipes. Its
result has the error of its arguments, so it is used only where those are rounded, and the error counts at their sites.
A chain of recipes has at most `DEPTH` functions, since all of them run at every use. Norms are applied with the
statistics that they saved, which are stored exactly. Recomputation in place of storage: Chen et al. 2016,
arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Functions that take about as long as reading their arguments, and have no state.
ELEMENTWISE = frozenset(
    (
        "mul",
        "add",
        "sub",
        "silu",
        "gelu",
        "relu",
        "sigmoid",
        "tanh",
        "leaky_relu",
        "hardswish",
        "softplus",
        "elu",
        "square",
    )
)
NORMS = frozenset(("layer_norm", "batch_norm"))
#: The longest chain of functions from a stored tensor.
DEPTH = 4


@dataclass(frozen=True)
class StoredView:
    """How a tensor lies in a stored payload.

    Attributes:
        item: the payload.
        shape, stride: of the tensor.
        offset: in values, from the start of the payload.
        version: of the payload's memory where that is the tensor's own, else 0.
    """

    item: Any
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    version: int = 0


@dataclass(frozen=True)
class Parameter:
    """A parameter, and the version that it had when the function used it."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class Recipe:
    """How a tensor is computed.

    Attributes:
        function: the function.
        args, kwargs: its arguments, with stored views, parameters and recipes in place of tensors.
        shape, stride, dtype: of the result.
        depth: how many functions lie between the stored payloads and the result.
        roots: the payloads that it is computed from in the end.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    depth: int
    roots: tuple[Any, ...]

    def result(self, read: Callable[[StoredView], Tensor]) -> Tensor:
        """The tensor; `read` unpacks a stored view.

        Raises:
            RuntimeError: a parameter was changed in place after the forward pass.
        """

        def found(argument: Any) -> Any:
            if isinstance(argument, StoredView):
                return read(argument)
            if isinstance(argument, Recipe):
                return argument.result(read)
            if isinstance(argument, Parameter):
                if argument.tensor._version != argument.version:
                    raise RuntimeError("a parameter that backward needs was modified by an inplace operation")
                return argument.tensor
            return argument

        with torch.no_grad():
            values: Tensor = self.function(*map(found, self.args), **{k: found(v) for k, v in self.kwargs.items()})
            values = values.to(self.dtype)  # a norm's statistics and weights may be wider than its output
        return laid_out(values, self.stride)


def laid_out(values: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values with the given strides. They are copied if they have others."""
    if values.stride() == stride:
        return values
    return torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device).copy_(values)


def normalised(
    x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, channels_second: bool
) -> Tensor:
    """The output of a norm, from its input and the statistics that it used.

    Args:
        x: [B, C, *] where channels are second, else [*, D].
        mean, scale: the mean and the reciprocal deviation: [C], or [*, 1].
        weight, bias: [C] or [D].
        channels_second: True for batch norm, False for layer norm.
    """
    if channels_second:
        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        factor = scale if weight is None else scale * weight
        shift = -mean * factor if bias is None else bias - mean * factor
        return torch.addcmul(shift.view(per_channel), x, factor.view(per_channel))
    values = (x - mean).mul_(scale)
    if weight is not None:
        values.mul_(weight)
    return values if bias is None else values.add_(bias)


def norm_arguments(call_args: Sequence[Any], call_kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments of a call of `F.layer_norm` or `F.batch_norm`, by name."""
    names = {
        "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
        "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    }[name]
    return {**dict(zip(names, call_args, strict=False)), **call_kwargs}
