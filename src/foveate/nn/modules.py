"""Modules whose weight is bit planes: PlaneLinear, PlaneEmbedding, PlaneConv.

Each is called as the module it replaces is. The weight itself is a `PlaneWeight`, a module of its own, so that
tied weights are one object and every tensor is a buffer. A module never changes its own levels: `foveate.nn.registry`
writes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.collect.kinds import Kind, kind_of, patches
from foveate.errors import FoveateError
from foveate.kernels.backends.table import ensure_loaded
from foveate.nn.fused_group import FusedGroup
from foveate.nn.linear_call import LinearCall
from foveate.nn.plane_module import Origin, PlaneModule
from foveate.nn.weight import PlaneWeight, _refused

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


for _name in ("getitem", "neg", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "pow"):
    setattr(PlaneWeight, f"__{_name}__", _refused(f"__{_name}__"))


class PlaneLinear(PlaneModule):
    """`nn.Linear`, or transformers' Conv1D, on planes.

    Attributes:
        own_call: computes this layer's product alone, without gradients.
        fused_group: the layers that share its input, this one among them (`foveate.nn.fused_group`); None if none do.
        position: its position in that group.
    """

    def __init__(self, weight: PlaneWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.out_features, self.in_features = weight.shape
        self.reset_calls()

    def reset_calls(self) -> None:
        """Leave any fused group, and take the planes, `input_level` and `input_range` that the layer has now."""
        ensure_loaded()
        self.own_call = LinearCall((self,))
        self.fused_group: FusedGroup | None = None
        self.position = 0
        self.weight.users.add(self)

    def renew(self) -> None:
        """Take the planes that the weight has now, after it was replaced."""
        self.own_call.hold((self,))

    def forward(self, input: Tensor, owners: Tensor | None = None) -> Tensor:
        """input [..., K] -> [..., N], in the dtype of the input.

        `owners` says for each row of the input which row of the pass it belongs to, where its shape does not.
        """
        if (torch.is_grad_enabled() and self._needs_gradient(input)) or torch.compiler.is_exporting():
            return self._product(input, owners)
        if owners is not None:
            return self.own_call.of(input, owners)[0]
        fused_group = self.fused_group
        if fused_group is None or not fused_group.is_fused:
            return self.own_call.of(input)[0]
        return fused_group.product(self.position, input)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("own_call", "fused_group", "position")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # a copy of one layer must not copy its whole group; the registry of a copied model forms the groups again
        self.reset_calls()


class PlaneEmbedding(PlaneModule):
    """`nn.Embedding` on planes. Only the rows that are looked up are unpacked."""

    def __init__(self, weight: PlaneWeight, padding_idx: int | None = None) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Indices [...] -> [..., K], in the dtype of the weight that was quantized."""
        tensors, maps = self.weight.read(input, 0)
        rows: Tensor = torch.ops.foveate.plane_embedding(input, tensors, self.weight.value.geometry, maps)
        return rows.to(self.weight.dtype)


class PlaneConv(PlaneModule):
    """`nn.Conv1d` and `nn.Conv2d` on planes.

    A dense convolution multiplies the patches of its input, each quantized by itself, with the planes. The weight of a
    grouped or depthwise one is unpacked, and the convolution is computed in the dtype of its input.
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
            return self._grouped(x)
        columns = patches(cast(nn.Conv2d, self), x)[:, 0]  # [B, K, P]
        y = self._product(columns.transpose(1, 2)).transpose(1, 2)
        spatial = self._output_sizes(x.shape[-len(self.kernel_size) :])
        return y.reshape(*x.shape[: x.dim() - 1 - len(spatial)], self.out_channels, *spatial)

    def _grouped(self, x: Tensor) -> Tensor:
        """The convolution with the unpacked weight: for each map in use, of those samples that read it."""
        single = x.dim() == len(self.kernel_size) + 1
        tensors, maps = self.weight.read(x[None] if single else x, len(self.kernel_size) + 1)
        bias = None if self.bias is None else self.bias.to(x.dtype)

        def of_map(which: int, some: Tensor) -> Tensor:
            dense = torch.ops.foveate.plane_unpack(tensors, self.weight.value.geometry, which)
            dense = dense.view(self.out_channels, -1, *self.kernel_size).to(x.dtype)
            return self._dense_forward(self, some, dense, bias)

        if maps is None or torch.compiler.is_dynamo_compiling():  # a graph cannot branch on which maps are in use
            return of_map(0, x)
        better = maps[:, 1]  # an unpacked weight has no estimate
        used = better.unique().tolist()
        if len(used) <= 1:
            return of_map(used[0] if used else 0, x)
        rows = [(better == which).nonzero()[:, 0] for which in used]
        parts = [of_map(which, x[mine]) for which, mine in zip(used, rows, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _output_sizes(self, sizes: torch.Size) -> list[int]:
        # (before, after) of each dimension, the first dimension first
        pad = self._reversed_padding_repeated_twice[::-1]
        return [
            (size + pad[2 * i] + pad[2 * i + 1] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i]
            + 1
            for i, size in enumerate(sizes)
        ]


def on_planes(module: nn.Module, weight: PlaneWeight) -> PlaneModule:
    """A module that computes on planes what `module` computes on its weight; raises `FoveateError` if none can."""
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
