"""What autograd holds in place of a tensor that it saves.

    Handle          a payload, which stores an interval of the tensor's storage, and how the tensor lies in it
    PassedThrough   the tensor itself
    ParameterCast   a parameter, of which the tensor is a copy in another dtype

This file knows shapes, strides and versions. How the values of a payload are encoded is in `forms/encodings.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.activations.forms.encodings import Encoding, Exact, Grouped, Recomputed
from foveate.activations.forms.identity import Interval
from foveate.activations.forms.rules import Need
from foveate.activations.recompute.recipes import Recipe, StoredView

if TYPE_CHECKING:
    from foveate.activations.measure.steps import Record, Step
    from foveate.activations.memory.peak import Token


@dataclass(frozen=True)
class RecomputedFunction(Recomputed):
    """The encoding of a tensor that a recipe computes again; it stores no values. `read` unpacks a stored view."""

    recipe: Recipe
    read: Callable[[StoredView], Tensor]

    @property
    def roots(self) -> tuple[Any, ...]:
        """The payloads that the tensor is computed from."""
        return self.recipe.roots

    def values(self) -> Tensor:
        """The values, [n], in the order in which the result lay in memory."""
        result = self.recipe.result(self.read)
        return result.as_strided((result.numel(),), (1,), result.storage_offset())


class Payload:
    """What is stored of one interval of a storage.

    Attributes:
        site: the name of its site.
        step: in which it was stored.
        need: what backward needs of it.
        interval: which part of the storage it is.
        encoding: its values.
        layout: shape and strides of the tensor, if the interval has gaps.
        exact: of an audited step, the exact values.
        other: of a probed step, a second rounding of the values.
        record: what a profiled step measures of it.
        token: by which a recorded step counts its bytes.
        lossy: whether backward gets other values than were saved.
    """

    __slots__ = (
        "__weakref__",
        "encoding",
        "exact",
        "interval",
        "layout",
        "lossy",
        "need",
        "other",
        "record",
        "site",
        "step",
        "token",
    )

    def __init__(self, site: str, step: Step, need: Need, interval: Interval, encoding: Encoding) -> None:
        self.site, self.step, self.need, self.interval, self.encoding = site, step, need, interval, encoding
        self.layout: tuple[torch.Size, tuple[int, ...]] | None = None
        self.exact: Encoding | None = None
        self.other: Encoding | None = None
        self.record: Record | None = None
        self.token: Token | None = None
        self.lossy = isinstance(encoding, (Grouped, Recomputed))

    @property
    def rounded(self) -> tuple[Payload, ...]:
        """The payloads whose rounding gives it its error: itself, or those that it is computed from."""
        return self.encoding.roots if isinstance(self.encoding, Recomputed) else (self,)


@dataclass(frozen=True)
class Handle:
    """A stored tensor: how it lies in its payload, and the version that it had when it was saved."""

    view: StoredView
    version_probe: Tensor
    version: int


@dataclass(frozen=True)
class PassedThrough:
    """A tensor that is kept as it is: a parameter, or a tensor without ordinary memory."""

    tensor: Tensor
    version: int | None


@dataclass(frozen=True)
class ParameterCast:
    """A copy of a parameter in another dtype, such as autocast makes. It is made again when backward needs it."""

    parameter: Tensor
    version: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def values(self) -> Tensor:
        """The copy."""
        return self.parameter.to(self.dtype).as_strided(self.shape, self.stride, 0)


Packed = Handle | PassedThrough | ParameterCast


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary strided one that has memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not (
            tensor.is_complex() or tensor.is_quantized or tensor.is_neg() or tensor.is_meta or tensor.is_inference()
        )
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and tensor.untyped_storage().nbytes() > 0
    )


def pass_through(tensor: Tensor) -> PassedThrough:
    """Keep a tensor as it is, with its version where it has one."""
    versioned = not (tensor.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))
    return PassedThrough(tensor if tensor.is_leaf else tensor.detach(), tensor._version if versioned else None)


def parameter_cast(tensor: Tensor, parameter: Tensor) -> ParameterCast | None:
    """How to make a cast copy of a parameter again; None where casting again does not give the same values.

    The values may differ: the copy may have other strides, or was written to through `.data`, which no version shows.
    """
    data = parameter.detach()
    made = ParameterCast(data, data._version, tensor.dtype, tensor.shape, tensor.stride())
    return made if torch.equal(made.values(), tensor.detach()) else None


def with_gaps(values: Tensor, layout: tuple[torch.Size, tuple[int, ...]], exact: bool) -> Tensor:
    """A tensor of a layout whose memory has gaps, from its values in order.

    Rounded values come back without gaps. Exact values get their strides again, since strides decide which kernel runs,
    and the kernel decides in which order numbers are added.
    """
    shape, stride = layout
    once = [1 if s == 0 else n for n, s in zip(shape, stride, strict=True)]
    values = values.view(once)
    if exact:
        values = torch.empty_strided(once, stride, dtype=values.dtype, device=values.device).copy_(values)
        return values.as_strided(shape, stride)
    return values.expand(shape)


def modified_error(expected: int, found: int, shape: torch.Size) -> RuntimeError:
    """The error that autograd itself raises for a saved tensor that was changed in place."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"a saved tensor of shape {list(shape)} is at version {found}; expected version {expected} instead"
    )


def stored_view(payload: Payload, tensor: Tensor) -> StoredView:
    """How a tensor lies in a payload of its storage."""
    offset = int(tensor.storage_offset()) - payload.interval.start
    return StoredView(payload, tensor.shape, tensor.stride(), offset, version_of(payload))


def version_of(payload: Payload) -> int:
    """The version of a payload's memory where that is the tensor's own; 0 of a copy, which nobody changes."""
    return payload.encoding.flat._version if isinstance(payload.encoding, Exact) else 0
