"""What autograd holds in place of a tensor: a stored interval and how to see the tensor in it, or the tensor itself.

Shapes, strides and versions are here; values are in payloads.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.activations.forms.encodings import Computed, Exact, Form, Grouped
from foveate.activations.forms.identity import Interval
from foveate.activations.forms.rules import Need
from foveate.activations.measure.steps import Record, Step
from foveate.activations.memory.peak import Token
from foveate.activations.recompute.recipes import Recipe, Source


@dataclass(frozen=True)
class Derived(Computed):
    """A recipe, and how its sources are read now: a form that holds nothing."""

    recipe: Recipe
    read: Callable[[Source], Tensor]

    @property
    def roots(self) -> tuple[Any, ...]:
        """The payloads that it is computed from."""
        return self.recipe.roots

    def values(self) -> Tensor:
        """The values, [n], in the order in which the result lay in memory."""
        result = self.recipe.result(self.read)
        return result.as_strided((result.numel(),), (1,), result.storage_offset())


class Payload:
    """What is stored of one interval of a storage."""

    __slots__ = (
        "__weakref__",
        "exact",
        "form",
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

    def __init__(self, site: str, step: Step, need: Need, interval: Interval, form: Form) -> None:
        self.site, self.step, self.need, self.interval, self.form = site, step, need, interval, form
        self.layout: tuple[torch.Size, tuple[int, ...]] | None = None  # of an interval that has gaps
        self.exact: Form | None = None
        self.other: Form | None = None
        self.record: Record | None = None
        self.token: Token | None = None
        self.lossy = isinstance(form, (Grouped, Computed))

    @property
    def rounded(self) -> tuple[Payload, ...]:
        """The payloads whose errors it has: itself, or those that it is computed from."""
        return self.form.roots if isinstance(self.form, Computed) else (self,)


@dataclass(frozen=True)
class Handle:
    """What autograd holds: a payload, how to see the tensor in it, and its version."""

    source: Source
    witness: Tensor
    version: int


@dataclass(frozen=True)
class Passed:
    """A tensor that is kept as it is: a parameter, or something that has no values of its own to round."""

    tensor: Tensor
    version: int | None


@dataclass(frozen=True)
class Recast:
    """A parameter's copy in another dtype, which is made again when it is needed."""

    parameter: Tensor
    version: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def values(self) -> Tensor:
        """The copy."""
        return self.parameter.to(self.dtype).as_strided(self.shape, self.stride, 0)


Packed = Handle | Passed | Recast


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


def passed(tensor: Tensor) -> Passed:
    """A tensor that is kept as it is, and its version where it has one."""
    versioned = not (tensor.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))
    return Passed(tensor if tensor.is_leaf else tensor.detach(), tensor._version if versioned else None)


def recast(tensor: Tensor, parameter: Tensor) -> Recast | None:
    """How to make a cast copy of a parameter again; None where that does not give the same values.

    It need not: the copy may have been laid out anew, or written to through `.data`, which no version shows.
    """
    data = parameter.detach()
    made = Recast(data, data._version, tensor.dtype, tensor.shape, tensor.stride())
    return made if torch.equal(made.values(), tensor.detach()) else None


def with_gaps(values: Tensor, layout: tuple[torch.Size, tuple[int, ...]], exact: bool) -> Tensor:
    """A tensor of a layout whose memory has gaps, from its values in order.

    Rounded ones are given back without gaps. Exact ones get their strides again, since these choose kernels, and with
    them the order in which numbers are added.
    """
    shape, stride = layout
    once = [1 if s == 0 else n for n, s in zip(shape, stride, strict=True)]
    values = values.view(once)
    if exact:
        values = torch.empty_strided(once, stride, dtype=values.dtype, device=values.device).copy_(values)
        return values.as_strided(shape, stride)
    return values.expand(shape)


def changed(expected: int, found: int, shape: torch.Size) -> RuntimeError:
    """Autograd's own complaint about a saved tensor that was changed in place."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"a saved tensor of shape {list(shape)} is at version {found}; expected version {expected} instead"
    )


def source_of(payload: Payload, tensor: Tensor) -> Source:
    """A tensor as it lies in a payload of its storage."""
    offset = int(tensor.storage_offset()) - payload.interval.start
    return Source(payload, tensor.shape, tensor.stride(), offset, version_of(payload))


def version_of(payload: Payload) -> int:
    """The version of the memory of a payload that is the tensor itself; of a copy it stays what it is."""
    return payload.form.flat._version if isinstance(payload.form, Exact) else 0
