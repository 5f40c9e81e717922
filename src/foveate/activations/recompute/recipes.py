"""Tensors that need not be stored, because cheap functions of stored ones give them again.

    gate, up stored  ->  silu(gate), silu(gate) * up        x, its reciprocal norm stored  ->  the norm's output

Autograd keeps the output of nearly every elementwise function beside its input: of a gated layer's four wide tensors
two determine the others. A `Recipe` is a function and where its arguments are found: a stored payload, a parameter, or
another recipe. What it gives is as exact as what it is made from, so it is used only where that is rounded anyway, and
the error counts at the payload's site. Chains are short (`DEPTH`), since each step is computed again at every use.
Norms are applied with their own statistics, which are stored exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Functions that cost about as much as reading their arguments, and have no state.
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
class Source:
    """A tensor as it lies in something stored.

    Attributes:
        item: what is stored (a payload).
        shape, stride: of the tensor.
        offset: in values, from the start of what is stored.
        version: of the memory that holds it, where that is the tensor's own.
    """

    item: Any
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    version: int = 0


@dataclass(frozen=True)
class Parameter:
    """A parameter, and its version when it was used."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class Recipe:
    """How a tensor is computed.

    Attributes:
        function: called with arguments in which sources, parameters and recipes stand for tensors.
        args, kwargs: those arguments.
        shape, stride, dtype: of the result.
        depth: functions between the result and what is stored.
        roots: what is stored, of all arguments of all functions.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    depth: int
    roots: tuple[Any, ...]

    def result(self, read: Callable[[Source], Tensor]) -> Tensor:
        """The tensor, computed from what `read` gives for each source.

        Raises:
            RuntimeError: a parameter was changed in place since.
        """

        def found(argument: Any) -> Any:
            if isinstance(argument, Source):
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
    """The same values with the given strides, copied if they have others."""
    if values.stride() == stride:
        return values
    return torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device).copy_(values)


def normalised(
    x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, channels_second: bool
) -> Tensor:
    """A norm's output from its input and the statistics it used.

    Args:
        x: [B, C, *] where channels are second, else [*, D].
        mean, scale: the mean and the reciprocal deviation: [C], or [*, 1].
        weight, bias: [C] or [D].
        channels_second: batch norm (else layer norm).
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
