"""dequantize: every module on planes becomes a plain module again, with the weight that is read at its present levels.

All dense weights are made first and put into their places last, when nothing can fail any more. So an error leaves the
model on its planes. The planes of all weights lie in common blocks of memory, which are freed when the last plane is
let go. So this order takes no more memory than any other: the planes, the dense weights, and one of these in float32.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.collect.kinds import Kind
from foveate.errors import BudgetError
from foveate.memory.available import free_memory
from foveate.nn.decoder.fuse import unfuse
from foveate.nn.experts import DOWN, PlaneExperts, is_transposed
from foveate.nn.foreign.derived import join_derived
from foveate.nn.modules import PlaneConv, take_hooks
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import detach, quantized_part, registry_of
from foveate.nn.replace import replace_module
from foveate.nn.residency.registry import ResidentRegistry
from foveate.sizes import format_bytes


def dequantize(model: nn.Module) -> None:
    """Make a quantized model a plain one again, in place, with the weights that it reads at its present levels.

    Linear layers, embeddings, convolutions, transformers' Conv1D and its mixtures' stacks of experts are what they were
    before `foveate.quantize`, in the dtype that was quantized, with the hooks and the mode that they have now; tied
    weights are one parameter. The model has its original names, so `save_pretrained` works, other libraries can use it,
    adapters can be merged into it, and it can be quantized again. Folded batch normalization and smoothed
    outliers are not undone. Inputs are not rounded any more, so outputs are those of the quantized
    model with all inputs at level 32, to the rounding of floats. The profile goes: `foveate.save` keeps it.

    Args:
        model: a quantized model, of `foveate.quantize` or `foveate.load`, or a wrapper around one.

    Raises:
        FoveateError: the model is not quantized.
        BudgetError: the dense weights do not fit into the memory that is free. The model is then unchanged.

    Example:
        >>> fv.apply(model, profile.uniform(4))
        >>> fv.dequantize(model)                     # a plain model, whose weights have 4 bits' worth of values
        >>> model.save_pretrained("four-bits/")
    """
    model = quantized_part(model)
    registry = registry_of(model)
    weights = registry.weights.values()
    sizes = [w.value.rows * w.value.columns for w in weights]
    needed = sum(n * w.dtype.itemsize for n, w in zip(sizes, weights, strict=True)) + 4 * max(sizes, default=0)
    if needed > free_memory():
        raise BudgetError(
            f"the dense weights take {format_bytes(needed)} beside the planes, and {format_bytes(free_memory())} are "
            "free: load fewer planes (`foveate.load(..., keep=map)`), or dequantize on a larger machine"
        )
    made: dict[int, nn.Module] = {}  # by the id of the module that is replaced
    places: list[tuple[str, nn.Module]] = []
    tied: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in made:
            if isinstance(module, PlaneExperts):
                made[id(module)] = _stacked(module)
            elif isinstance(module, PlaneModule) and not _in_stack(model, name):
                made[id(module)] = _plain(module, tied)
            else:
                continue
        places.append((name, module))
    for name, module in places:
        replace_module(model, name, made[id(module)])
    join_derived(model)
    unfuse(model)
    detach(model)
    if isinstance(registry, ResidentRegistry):
        registry.leave()


def _in_stack(model: nn.Module, name: str) -> bool:
    """Whether a module is the projection of one expert; it is dequantized with its stack."""
    stack = name.rpartition(".")[0].rpartition(".")[0]
    return isinstance(model.get_submodule(stack), PlaneExperts)


def _plain(module: PlaneModule, tied: dict[int, nn.Parameter]) -> nn.Module:
    """The module that a plane module replaced, with its present weight, bias, hooks and mode."""
    made = copy.copy(module.origin.module)
    parameters: dict[str, nn.Parameter | None] = dict(made._parameters)
    weight = tied.get(id(module.weight))
    if weight is None:
        dense = _as_kept(module)
        weight = tied[id(module.weight)] = nn.Parameter(dense, requires_grad=module.origin.requires_grad)
    # the weight comes first, as in torch's own modules
    parameters = {"weight": weight, **parameters}
    if module.bias is not None:
        parameters["bias"] = _bias(module.bias, parameters.get("bias"), module.weight.dtype)
    made.__dict__["_parameters"] = parameters
    take_hooks(made, module)
    return made.train(module.training)


def _as_kept(module: PlaneModule) -> Tensor:
    """The dense weight in the dtype and the layout of the module that planes replaced."""
    dense = module.weight.dequantize().to(module.weight.dtype)
    if module.origin.kind is Kind.LINEAR_TRANSPOSED:
        return dense.t().contiguous()
    if module.origin.kind is Kind.CONV:
        return dense.view(len(dense), -1, *cast(PlaneConv, module).kernel_size)
    return dense


def _bias(bias: nn.Parameter, old: nn.Parameter | None, dtype: torch.dtype) -> nn.Parameter:
    """The present bias in the dtype of the weight, in its old parameter where others may share it."""
    if bias.dtype == dtype:
        return bias
    if old is None or old.is_meta or old.dtype != dtype:
        return nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
    with torch.no_grad():
        old.copy_(bias)
    old.requires_grad_(bias.requires_grad)
    return old


def _stacked(apart: PlaneExperts) -> nn.Module:
    """The layer that a stack of experts was, with the present weights of all its experts."""
    made = copy.copy(apart.origin)
    parameters: dict[str, nn.Parameter | None] = {}
    transposed = is_transposed(made)
    for part in (apart.up, DOWN):
        experts: list[Any] = [apart.get_submodule(f"{i}.{part}") for i in range(apart.num_experts)]
        first = experts[0]
        rows, columns = first.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        stack = torch.empty(len(experts), *shape, dtype=first.weight.dtype)
        for own, expert in zip(stack, experts, strict=True):
            # an expert that quantize was told to skip is a plain layer
            dense = expert.weight.dequantize() if isinstance(expert, PlaneModule) else expert.weight.detach()
            own.copy_(dense.t() if transposed else dense)
        wanted = first.origin.requires_grad if isinstance(first, PlaneModule) else first.weight.requires_grad
        parameters[part] = nn.Parameter(stack, requires_grad=wanted)
        if first.bias is not None:
            biases = torch.stack([expert.bias.detach().to(stack.dtype) for expert in experts])
            parameters[f"{part}_bias"] = nn.Parameter(biases, requires_grad=first.bias.requires_grad)
    made.__dict__["_parameters"] = {**parameters, **made._parameters}
    take_hooks(made, apart)
    return made.train(apart.training)
