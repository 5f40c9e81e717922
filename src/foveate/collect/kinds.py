"""Which modules hold a weight that planes can hold, and how each is seen as a matrix [N rows, K inputs].

A linear layer, transformers' Conv1D, an embedding and a convolution are treated alike: rows of outputs by columns of
inputs. The inputs of a convolution are the K = in/groups x kernel values of a patch; the rows of an embedding are its
entries. Depthwise filters are [channels, kernel].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


class Kind(Enum):
    """How a module uses its weight."""

    LINEAR = "linear"
    LINEAR_TRANSPOSED = "linear_transposed"  # transformers' Conv1D keeps [K, N]
    EMBEDDING = "embedding"
    CONV = "conv"


#: What the part of a module that holds its weight is called, where the module has a forward of its own
#: (`foveate.nn.foreign.derived`).
PRODUCT = "product"
_BASES = (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv1d)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module that can be quantized, or None. Subclasses that change `forward` have none."""
    if is_parametrized(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None  # also where a hook computes the weight before each call
    forward = type(module).forward
    if forward is nn.Linear.forward:
        # attention reads the weight of this class itself
        return None if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) else Kind.LINEAR
    if forward is nn.Embedding.forward:
        return Kind.EMBEDDING if cast(nn.Embedding, module).max_norm is None else None
    if forward in (nn.Conv2d.forward, nn.Conv1d.forward):
        return Kind.CONV
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return Kind.LINEAR_TRANSPOSED
    return None


def derived_from(module: nn.Module) -> type[nn.Module] | None:
    """The class whose forward does the product of a module that has another forward around it; None for all others."""
    base = next((base for base in _BASES if isinstance(module, base)), None)
    if base is None or type(module).forward is base.forward or hasattr(module, PRODUCT):
        return None
    alike = _with_forward_of(module, base)
    return base if kind_of(alike) is not None else None


def _with_forward_of(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """A module of class `base` that shares all attributes with `module`."""
    made = base.__new__(base)
    made.__dict__.update(module.__dict__)
    return made


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight as float32 [N, K], detached."""
    weight = cast(Tensor, module.weight).detach()
    kind = kind_of(module)
    if kind is Kind.LINEAR_TRANSPOSED:
        weight = weight.t()
    elif kind is Kind.CONV:
        weight = weight.flatten(1)
    return weight.float()


def patches(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs of each output of a convolution: [B, groups, K, P], P output positions.

    In memory the inputs of one position lie together, since products read them as rows: made by one copy of a view.
    (`F.unfold` writes them the other way round, and a second copy of so much memory takes longer than the product.)
    """
    if x.dim() == 1 + len(conv.kernel_size):
        x = x[None]
    padding = conv._reversed_padding_repeated_twice
    x = F.pad(x, padding, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    view, count = x, len(conv.kernel_size)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2):
        view = view.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    axes = range(2, 2 + count)  # of the output, after which come those of the kernel
    positions, each = math.prod(view.shape[axis] for axis in axes), math.prod(view.shape[2 + count :])
    view = view.permute(0, *axes, 1, *range(2 + count, 2 + 2 * count))
    rows = view.reshape(x.shape[0], positions, conv.groups, x.shape[1] // conv.groups * each)
    return rows.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class QuantizableWeight:
    """A weight of a model: the modules that share it, first the one whose name the site takes."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def is_embedding_only(self) -> bool:
        """Whether the weight is only read by rows."""
        return all(kind_of(m) is Kind.EMBEDDING for m in self.modules)


def find_weights(model: nn.Module) -> list[QuantizableWeight]:
    """Every weight that can be quantized, in the model's order; modules that share a parameter are one entry.

    A weight that some other module uses as well stays as it is, and so do adapters, and the weight of a module with a
    forward of its own (see `derived_from`) or one that was put into the object.
    """
    adapters = {id(m) for m in parts_of_adapters(model)}
    by_parameter: dict[int, list[tuple[str, nn.Module]]] = {}
    elsewhere: set[int] = set()  # parameters of modules that stay as they are
    for name, module in model.named_modules():
        ours = kind_of(module) is not None and "forward" not in module.__dict__ and id(module) not in adapters
        if ours and cast(Tensor, module.weight).is_floating_point():
            by_parameter.setdefault(id(module.weight), []).append((without_product(name), module))
        else:
            elsewhere.update(map(id, module.parameters(recurse=False)))
    found = []
    for parameter, entries in by_parameter.items():
        shapes = {weight_matrix_shape(m) for _, m in entries}
        if len(shapes) == 1 and parameter not in elsewhere:
            found.append(QuantizableWeight(tuple(n for n, _ in entries), tuple(m for _, m in entries)))
    return found


def without_product(name: str) -> str:
    """The name of the module that a product is part of, or the name itself."""
    return name.removesuffix(f".{PRODUCT}")


def listed(names: Sequence[str]) -> str:
    """Some names, as text: the first five, and how many others there are."""
    others = len(names) - 5
    return ", ".join(names[:5]) + (f" and {others} other{'s' if others > 1 else ''}" if others > 0 else "")


def parts_of_adapters(model: nn.Module) -> list[nn.Module]:
    """All modules that adapters add to a model (peft's layers name their trained children)."""
    found = []
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", ())
        for name in names if isinstance(names, tuple) else ():
            child = module._modules.get(name)
            found += list(child.modules()) if child is not None else []
    return found


def weight_matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of `weight_matrix`, without computing it."""
    shape = torch.Size(cast(Tensor, module.weight).shape)
    if kind_of(module) is Kind.LINEAR_TRANSPOSED:
        return shape[1], shape[0]
    return shape[0], shape[1:].numel()
