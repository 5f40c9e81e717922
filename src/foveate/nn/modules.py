"""Modules whose weight is bit planes: PlaneLinear, PlaneEmbedding, PlaneConv.

Each is called as the module it replaces is. The weight itself is a `PlaneWeight`, a module of its own, so that
tied weights are one object and every tensor is a buffer. Precision is changed by `foveate.apply` and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from foveate.collect.kinds import Kind, kind_of, patches
from foveate.errors import FoveateError, StateError
from foveate.kernels.dispatch import ensure_loaded
from foveate.nn.siblings import NO_BIAS, Products, Siblings
from foveate.nn.states import FORM, STORED, form_of, taken, weight_in
from foveate.planes import PlaneTensor, linear

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


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
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
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


for _name in ("getitem", "neg", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "pow"):
    setattr(PlaneWeight, f"__{_name}__", _refused(f"__{_name}__"))


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


class PlaneLinear(PlaneModule):
    """`nn.Linear`, or transformers' Conv1D, on planes.

    Attributes:
        alone: its product without gradients.
        siblings: the layers that share its input, itself among them; see `foveate.nn.siblings`.
        place: its place among them.
    """

    def __init__(self, weight: PlaneWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.out_features, self.in_features = weight.shape
        self.introduce()

    def introduce(self) -> None:
        """Begin anew without siblings, with the planes, `input_level` and `input_range` that are there now."""
        ensure_loaded()
        self.alone = Products((self,))
        self.siblings: Siblings | None = None
        self.place = 0
        self.weight.users.add(self)

    def renew(self) -> None:
        """The weight has become another: multiply with it as it is now."""
        self.alone.hold((self,))

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N], in the dtype of the input."""
        if (torch.is_grad_enabled() and self._needs_gradient(input)) or torch.compiler.is_exporting():
            return self._product(input)
        siblings = self.siblings
        if siblings is None or not siblings.together:
            return self.alone.of(input)[0]
        return siblings.product(self.place, input)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("alone", "siblings", "place")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # a copy of one layer is not to be a copy of all; a model's registry makes the copies siblings again
        self.introduce()


class PlaneEmbedding(PlaneModule):
    """`nn.Embedding` on planes: only the rows asked for are unpacked."""

    def __init__(self, weight: PlaneWeight, padding_idx: int | None = None) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Indices [...] -> [..., K], in the dtype of the weight that was quantized."""
        value = self.weight.value
        rows: Tensor = torch.ops.foveate.plane_embedding(input, value.tensors, value.form, 0)
        return rows.to(self.weight.dtype)


class PlaneConv(PlaneModule):
    """`nn.Conv1d` and `nn.Conv2d` on planes.

    A dense convolution multiplies the patches of its input, each quantized by itself, with the planes. A grouped or
    depthwise one is unpacked and multiplied in the dtype of its input.
    """

    def __init__(self, weight: PlaneWeight, conv: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(weight, conv.bias)
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size: tuple[int, ...] = conv.kernel_size
        self.stride: tuple[int, ...] = conv.stride
        self.padding: str | tuple[int, ...] = conv.padding
        self.dilation: tuple[int, ...] = conv.dilation
        self.padding_mode = conv.padding_mode
        self._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        self._dense_forward: Callable[..., Tensor] = type(conv)._conv_forward

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, ...] or [C, ...] -> [B, N, ...] or [N, ...]."""
        x = input
        if self.groups != 1:
            dense = self.weight.dequantize().view(self.out_channels, -1, *self.kernel_size).to(x.dtype)
            return self._dense_forward(self, x, dense, None if self.bias is None else self.bias.to(x.dtype))
        columns = patches(cast(nn.Conv2d, self), x)[:, 0]  # [B, K, P]
        y = self._product(columns.transpose(1, 2)).transpose(1, 2)
        spatial = self._output_sizes(x.shape[-len(self.kernel_size) :])
        return y.reshape(*x.shape[: x.dim() - 1 - len(spatial)], self.out_channels, *spatial)

    def _output_sizes(self, sizes: torch.Size) -> list[int]:
        pad = self._reversed_padding_repeated_twice[
            ::-1
        ]  # (before, after) of each dimension, the first dimension first
        return [
            (size + pad[2 * i] + pad[2 * i + 1] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
            + 1
            for i, size in enumerate(sizes)
        ]


def on_planes(module: nn.Module, weight: PlaneWeight) -> PlaneModule:
    """The module that does on planes what `module` does on its parameter."""
    kind = kind_of(module)
    bias = cast("Tensor | None", getattr(module, "bias", None))
    if kind in (Kind.LINEAR, Kind.LINEAR_TRANSPOSED):
        made: PlaneModule = PlaneLinear(weight, bias)
    elif kind is Kind.EMBEDDING:
        made = PlaneEmbedding(weight, cast(nn.Embedding, module).padding_idx)
    elif kind is Kind.CONV:
        made = PlaneConv(weight, cast(nn.Conv2d, module))
    else:
        raise FoveateError(f"{type(module).__name__} holds no weight that planes can hold")
    made.origin = Origin(without(module, "weight"), kind, cast(Tensor, module.weight).requires_grad)
    take_hooks(made, module)
    return made.train(module.training)


def without(module: nn.Module, *names: str) -> nn.Module:
    """A copy of a module that shares everything with it but does not hold the parameters named, nor any hooks."""
    made = copy.copy(module)
    state = made.__dict__
    state.update({key: dict(state[key]) for key in ("_parameters", "_buffers", "_modules")})
    state["_parameters"] = {name: p for name, p in state["_parameters"].items() if name not in names}
    take_hooks(made, nn.Module())
    return made


def take_hooks(made: nn.Module, module: nn.Module) -> None:
    """Give a module that replaces another one its hooks: the very dictionaries, so that handles still remove them."""
    for name in _HOOKS:
        setattr(made, name, getattr(module, name))


def _as_float32(bias: Tensor) -> nn.Parameter:
    """The parameter itself where it can be, for others may share it."""
    if isinstance(bias, nn.Parameter) and bias.dtype == torch.float32:
        return bias
    return nn.Parameter(bias.detach().float(), requires_grad=bias.requires_grad)
