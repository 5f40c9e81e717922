"""Fold BatchNorm into the layer before it: in evaluation mode it is a scale and a shift of each channel.

    norm(W x + b) = s (W x + b - mean) + beta,    s = gamma / sqrt(variance + eps)

so W' = s W and b' = s (b - mean) + beta.

Which norm follows which layer is in the code of the model, not in its modules. So one batch is run, and every operation
is recorded. A norm is folded into a layer if the layer's output goes into that norm and nowhere else; all others stay.
A folded norm becomes an `nn.Identity`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate.collect.kinds import Kind, kind_of
from foveate.collect.objectives import run
from foveate.errors import DataError, WeightError
from foveate.nn.foreign.folded import _ATTRIBUTE, _is_norm, _remove_norms, folded_of
from foveate.nn.plane_module import PlaneModule


def fold_batchnorm(model: nn.Module, batch: Any) -> tuple[str, ...]:
    """Merge every BatchNorm that directly follows a convolution or a linear layer into it, in place.

    Call it before `foveate.quantize`, which then has no norm to store and no product to rescale. The output of the
    model changes by no more than float rounding. Do not fold a model whose code takes other branches for other inputs.

    Args:
        model: any module, in evaluation mode.
        batch: one batch, as for `foveate.quantize`; it only shows the order of the layers.

    Returns:
        The names of the norms that were folded.

    Raises:
        DataError: the batch is empty, or the output is an object that hides its tensors.
        WeightError: the model is in training mode, where a norm's scale is that of each batch, or is quantized already.
    """
    modules = dict(model.named_modules())
    if any(isinstance(m, PlaneModule) for m in modules.values()):
        raise WeightError("the model is quantized already: fold BatchNorm first, then quantize")
    training = [n or type(m).__name__ for n, m in modules.items() if m.training and (not n or _is_norm(m))]
    if training:
        raise WeightError(f"{training[0]} is in training mode, where BatchNorm follows each batch: call model.eval()")
    recorder = _UseRecorder({n: cast(Tensor, m.weight) for n, m in modules.items() if _is_layer(m)})
    with torch.no_grad(), _recording(recorder, modules), recorder:
        output = run(model, batch)
    recorder.used(tree_leaves(output))
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not found:
        raise DataError(
            f"the model's output, a {type(output).__name__}, hides its tensors: what goes into it is unknown"
        )
    if not any(leaf.numel() for leaf in found):
        raise DataError("the batch is empty: one sample is enough, but none shows nothing")
    owners = Counter(id(p) for m in modules.values() for p in m.parameters(recurse=False))
    pairs: list[tuple[str, str]] = []
    for layer_name, uses in recorder.uses.items():
        layer, norm_name = modules[layer_name], next(iter(uses), None)
        if len(uses) != 1 or norm_name is None or recorder.calls[layer_name] != 1 or recorder.calls[norm_name] != 1:
            continue
        norm = modules[norm_name]
        alone = all(owners[id(p)] == 1 for m in (layer, norm) for p in m.parameters(recurse=False))
        if (
            alone
            and recorder.outputs[layer_name] is recorder.inputs[norm_name]
            and _fits(layer, norm, recorder, layer_name)
        ):
            _fold(layer, norm)
            pairs.append((layer_name, norm_name))
    _remove_norms(model, pairs)
    model.__dict__[_ATTRIBUTE] = (*folded_of(model), *pairs)
    return tuple(norm for _, norm in pairs)


class _UseRecorder(TorchDispatchMode):
    """Records what uses the outputs of layers, which it knows by their memory.

    Attributes:
        uses: for each layer, the norms that its output goes into; None stands for any other use.
        calls: how often each layer and norm was called.
        outputs, inputs: the last output of each layer, and the last input of each norm.
        norm, layer: the norm and the layer that run now.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: dict[str, set[str | None]] = {}
        self.calls: Counter[str] = Counter()
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.norm: str | None = None
        self.layer: str | None = None
        self._weights = {t.untyped_storage().data_ptr(): name for name, t in weights.items()}
        self._layers: dict[int, str] = {}

    def made(self, name: str, y: Tensor) -> None:
        """Take the output of a layer."""
        self.calls[name] += 1
        self.outputs[name] = y  # kept, so that no other tensor gets its memory
        self._layers[y.untyped_storage().data_ptr()] = name
        self.uses.setdefault(name, set())

    def used(self, values: Sequence[Any]) -> None:
        """Take the arguments of an operation."""
        for value in values:
            if not isinstance(value, Tensor):
                continue
            memory = value.untyped_storage().data_ptr()
            layer, owner = self._layers.get(memory), self._weights.get(memory)
            if layer is not None:
                self.uses[layer].add(self.norm)
            if owner is not None and owner != self.layer:  # folding would change the result of this operation
                self.uses.setdefault(owner, set()).add(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record and run one operation of the model."""
        self.used(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


@contextmanager
def _recording(recorder: _UseRecorder, modules: dict[str, nn.Module]) -> Iterator[None]:
    def before_layer(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            recorder.layer = name

        return hook

    def after_layer(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            recorder.layer = None
            recorder.made(name, output)

        return hook

    def before_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.calls[name] += 1
            recorder.inputs[name] = args[0] if args else kwargs["input"]
            recorder.norm = name

        return hook

    def after_norm(module: nn.Module, args: Any, output: Any) -> None:
        recorder.norm = None

    handles = []
    for name, module in modules.items():
        # a hook of the user may read the output, which no operation shows
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        if _is_norm(module):
            handles.append(module.register_forward_pre_hook(before_norm(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after_norm, always_call=True))
        elif _is_layer(module):
            handles.append(module.register_forward_pre_hook(before_layer(name)))
            handles.append(module.register_forward_hook(after_layer(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_layer(module: nn.Module) -> bool:
    return kind_of(module) in (Kind.LINEAR, Kind.LINEAR_TRANSPOSED, Kind.CONV)


def _fits(layer: nn.Module, norm: nn.Module, recorder: _UseRecorder, name: str) -> bool:
    """Whether the norm's channels are the layer's outputs, and its statistics are those of training."""
    is_conv = kind_of(layer) is Kind.CONV
    channels = recorder.outputs[name].shape[1] if recorder.outputs[name].dim() > 1 else 0
    # a norm takes T for the channels of [B, T, N], and of a convolution's [N, T]
    plain = recorder.outputs[name].dim() == (cast(Tensor, layer.weight).dim() if is_conv else 2)
    return plain and channels == norm.num_features and isinstance(norm.running_mean, Tensor)


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    made_by: Any = norm
    weight = cast(nn.Parameter, layer.weight)
    bias = cast("nn.Parameter | None", layer.bias)
    with torch.no_grad():
        scale_N = torch.rsqrt(made_by.running_var.double() + made_by.eps)
        if made_by.weight is not None:
            scale_N = scale_N * made_by.weight.double()
        shift_N = -made_by.running_mean.double() if bias is None else bias.double() - made_by.running_mean.double()
        shift_N = shift_N * scale_N
        if made_by.bias is not None:
            shift_N = shift_N + made_by.bias.double()
        rows = 1 if kind_of(layer) is Kind.LINEAR_TRANSPOSED else 0
        shape = [-1 if i == rows else 1 for i in range(weight.dim())]
        weight.copy_(weight.double() * scale_N.view(shape))
        if bias is None:
            layer.bias = nn.Parameter(shift_N.to(weight.dtype), requires_grad=weight.requires_grad)
        else:
            bias.copy_(shift_N)
