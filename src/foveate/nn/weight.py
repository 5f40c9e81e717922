"""PlaneWeight: a weight on planes as a module, whose tensors are buffers.

It is not a tensor: code that computes with `module.weight` itself gets an exception that says what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError, StateError
from foveate.nn.passes import Passes
from foveate.nn.states import EXACT, GEOMETRY, STORED, geometry_of, taken, weight_in
from foveate.planes import PlaneTensor


class _NotATensorError(FoveateError, AttributeError):
    """An attribute of tensors was read from a weight on planes. `hasattr` gives False."""


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
    """An object that holds a handle of a weight's planes, or anything else that depends on them."""

    def renew(self) -> None:
        """Take the planes and the geometry that the weight has now."""


class PlaneWeight(nn.Module):
    """A `PlaneTensor` whose tensors are buffers. `shape`, `dtype` and `device` read like a parameter's.

    A state_dict holds what is stored, and its geometry: rows, columns, group, reach and exponent (`foveate.nn.states`).
    Loading one replaces the planes and renews all users of the weight, or leaves everything as it was.

    Attributes:
        value: the planes.
        users: objects to renew when the planes are replaced, held by weak references.
        passes: the passes of the model that the weight belongs to; None outside of any, where it is read at its own
            `active_levels`.
        place: its number in that model.
    """

    def __init__(self, planes: PlaneTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.users: WeakSet[WeightUser] = WeakSet()
        #: The dtype of the weight that was quantized. Embeddings and unpacked convolutions compute in it.
        self.dtype = dtype
        #: The name of its site, for messages.
        self.name = ""
        self.passes: Passes | None = None
        self.place = 0
        self.set(planes)

    def set(self, planes: PlaneTensor) -> None:
        """Replace the planes, after they were moved to other memory, or some were dropped."""
        self.value = planes
        self.geometry = geometry_of(planes)
        for name, tensor in zip(STORED, planes.tensors, strict=False):
            self.register_buffer(name, tensor)
        e = planes.exact
        for name, of_exact in zip(EXACT, (None, None) if e is None else (e.values, e.tiles), strict=True):
            self.register_buffer(name, of_exact)  # a buffer that is None is in no state
        self.register_buffer("exact_offsets", None if e is None else e.offsets, persistent=False)
        # not in a state_dict: active levels belong to the map in force, not to the weight
        self.register_buffer("active_levels", planes.active_levels, persistent=False)

    @property
    def shape(self) -> torch.Size:
        """[rows, columns]."""
        return self.value.shape

    @property
    def device(self) -> torch.device:
        """The device that the planes are on."""
        return self.value.scales.device

    def dequantize(self) -> Tensor:
        """The dense weight, float32 [rows, columns], at the levels of the map that was published last."""
        return self.value.dequantize()

    def read(self, x: Tensor, trailing: int, owners: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What the present pass reads of the weight.

        Args:
            x: the input.
            trailing: how many dimensions at the end of x are not dimensions of rows.
            owners: int64 [M], for each row of x the row of the pass; None if that follows from the shape of x.

        Returns:
            The tensors of the weight as ops take them, and the maps of each row of x, uint8 [M, 2]; None outside of any
            model, and in programs that are exported.
        """
        if self.passes is None or torch.compiler.is_exporting():
            return self.value.tensors, None
        book = self.passes.book
        levels: Tensor = torch.ops.foveate.pass_levels(book, self.place, *self.value.grid)
        maps: Tensor = torch.ops.foveate.pass_rows(book, x, trailing, owners)
        return (*self.value.tensors[:-1], levels), maps

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneWeight:
        # a cast to another dtype must not touch the stored form, and planes can only be on the CPU yet
        moved = fn(torch.empty(0, dtype=torch.uint8))
        if moved.device != self.device:
            raise FoveateError(f"planes cannot move to {moved.device}: this version of foveate computes on the CPU")
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + GEOMETRY] = self.geometry

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
        known = {prefix + name for name in (*STORED, *EXACT, GEOMETRY)}
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key not in known]
        missing = [prefix + name for name in (*STORED, GEOMETRY) if prefix + name not in state_dict]
        try:
            loaded = weight_in(state_dict, prefix, self.value)
        except StateError as error:
            error_msgs.append(str(error))
            return
        if loaded is None:  # not all of it is there, so nothing of it is taken
            missing_keys += missing
            return
        # the planes are copied even if the caller asks for `assign`, for they lie in blocks of memory of their own
        self.set(taken(self.value, loaded))
        for user in tuple(self.users):
            user.renew()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("users", "passes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.users = WeakSet()  # the users of a copy are copies, which register themselves
        self.passes = None  # and the registry of a copied model binds its weights

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse functions of torch that are given the weight itself, like `F.linear(x, embedding.weight)`."""
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
        """Shape, group and the range of active levels."""
        levels = self.value.active_levels[0]
        low, high = (int(levels.min()), int(levels.max())) if levels.numel() else (0, 0)
        return f"{self.value.rows}, {self.value.columns}, group={self.value.group}, levels={low}..{high}"
