"""PlaneWeight: a weight on planes as a module, whose tensors are buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError, StateError
from foveate.nn.states import FORM, STORED, form_of, taken, weight_in
from foveate.planes import PlaneTensor


class _NotATensorError(FoveateError, AttributeError):
    """What a tensor has, asked of a weight on planes; `hasattr` says no."""


def _refusal(name: str) -> str:
    return (
        f"weight.{name} was asked of a weight on planes, which is no tensor: use weight.dequantize(), make the "
        "model plain with foveate.dequantize(model), or leave the module as it is with quantize(..., skip=...)"
    )


def _refused(name: str) -> Callable[..., Any]:
    def operator(self: PlaneWeight, *_: Any) -> Any:
        raise _NotATensorError(_refusal(name))

    return operator


class WeightUser(Protocol):
    """What keeps a handle, or anything else, of a weight's present planes."""

    def renew(self) -> None:
        """Take the planes and the form that the weight has now."""


class PlaneWeight(nn.Module):
    """A `PlaneTensor` whose tensors are buffers. `shape`, `dtype` and `device` read like a parameter's.

    A state_dict holds what is stored, and the form it is stored in (`form`: rows, columns, group, reach, exponent).
    Loading one fits the weight and all its users to what is loaded, or leaves everything as it was.

    Attributes:
        users: what has to know when this weight becomes another; none is kept alive by it.
    """

    def __init__(self, planes: PlaneTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.users: WeakSet[WeightUser] = WeakSet()
        #: The dtype of the weight that was quantized: what embeddings and unpacked convolutions compute in.
        self.dtype = dtype
        #: The name of its site, for messages.
        self.name = ""
        self.set(planes)

    def set(self, planes: PlaneTensor) -> None:
        """Take other planes of the same weight (after they moved, or were dropped)."""
        self.value = planes
        self.form = form_of(planes)
        for name, tensor in zip(STORED, planes.tensors, strict=False):
            self.register_buffer(name, tensor)
        # a state_dict holds the weight, not the level at which it is read: that is the map's
        self.register_buffer("tags", planes.tags, persistent=False)

    @property
    def shape(self) -> torch.Size:
        """[rows, columns]."""
        return self.value.shape

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.value.scales.device

    def dequantize(self) -> Tensor:
        """The dense weight at its present levels, float32 [rows, columns]."""
        return self.value.dequantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneWeight:
        # a cast to another dtype must not touch the stored form, and there are no planes elsewhere than on the CPU yet
        moved = fn(torch.empty(0, dtype=torch.uint8))
        if moved.device != self.device:
            raise FoveateError(f"planes cannot move to {moved.device}: this version of foveate computes on the CPU")
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + FORM] = self.form

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = {prefix + name for name in (*STORED, FORM)}
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key not in known]
        missing = [prefix + name for name in (*STORED, FORM) if prefix + name not in state_dict]
        try:
            loaded = weight_in(state_dict, prefix, self.value)
        except StateError as error:
            error_msgs.append(str(error))
            return
        if loaded is None:  # not all of it is there, so nothing of it is taken
            missing_keys += missing
            return
        # always copies, also where the caller asks for an exchange (`assign`): planes lie in blocks of their own
        self.set(taken(self.value, loaded))
        for user in tuple(self.users):
            user.renew()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "users"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.users = WeakSet()  # a copy's users are copies, and come by themselves

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be computed with directly, as `F.linear(x, embedding.weight)` would."""
        given = (*args, *(kwargs or {}).values())
        name = next((part.name for part in given if isinstance(part, PlaneWeight) and part.name), "a weight")
        raise FoveateError(
            f"{getattr(func, '__name__', func)} was given {name}, which is on planes: call its module, use "
            "weight.dequantize(), or leave the module as it is with quantize(..., skip=...)"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or not hasattr(Tensor, name):
                raise
            raise _NotATensorError(_refusal(name)) from None

    def extra_repr(self) -> str:
        """Shape, group and the range of levels."""
        levels = self.value.tags[0]
        low, high = (int(levels.min()), int(levels.max())) if levels.numel() else (0, 0)
        return f"{self.value.rows}, {self.value.columns}, group={self.value.group}, levels={low}..{high}"
