"""Smooth outlier channels: a norm divides a channel by a factor, and the layers behind it multiply by the factor.

    norm(x) / s, (W s)      the product is the same, and the input of W has no outliers (SmoothQuant, arXiv:2211.10438)

The largest channel of a row sets its scale, and at level 4 the step of its block of 32. The factors are powers of two,
so that the float model computes exactly what it did: `s = 2^round(log2(max|x|^a / max|w|^(1 - a)))`, for several
strengths `a`. What each strength does to the loss of a layer's input is measured. Each norm gets the best strength, or
none where it gains too little, since weights with stretched columns lose a little themselves.

Which layers a norm feeds is in the code of the model. So one batch is run, and every operation is recorded. A norm is
smoothed if its output goes into linear layers and nowhere else; all others stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from foveate.collect.collector import Collector
from foveate.collect.evaluation import frozen
from foveate.collect.kinds import Kind, QuantizableWeight, find_weights, kind_of, weight_matrix
from foveate.collect.objectives import Objective, infer, run
from foveate.errors import DataError, WeightError
from foveate.formats.levels import INPUT_LEVELS, check_input_level
from foveate.nn.plane_module import PlaneModule
from foveate.prepare.fold import _UseRecorder
from foveate.progress import track

_STRENGTHS = (0.25, 0.5, 0.75)
#: A norm is smoothed if no more than this part of its layers' input loss is left.
_MAX_REMAINING = 0.9


@dataclass(frozen=True)
class Smoothed:
    """What was done to one norm and the layers behind it.

    Attributes:
        norm, layers: names of the modules.
        strength: how much of a channel's range went into the weights; 0 if the norm stays as it was.
        before, after: loss of the layers' inputs at the given level, in the objective's unit.
    """

    norm: str
    layers: tuple[str, ...]
    strength: float
    before: float
    after: float


def smooth(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    objective: Objective | None = None,
    level: int = 4,
    progress: bool = True,
) -> tuple[Smoothed, ...]:
    """Move outlier channels from the inputs of linear layers into their weights, in place, where that lowers the loss.

    Call it before `foveate.quantize`. The outputs of the model stay the same bit for bit, as long as no value leaves
    the range of its dtype. Do not smooth a model whose code takes other branches for other inputs.

    Args:
        model: any module.
        batches: a small data set, as for `foveate.quantize`; the model runs on it four times.
        objective: as for `foveate.quantize`.
        level: the level of inputs whose loss is lowered, 4 or 8.
        progress: whether to show progress.

    Returns:
        What was done to each norm that can be smoothed.

    Raises:
        DataError: there are no batches, or a loss that is not finite.
        WeightError: the model is quantized already.
        LevelError: inputs have no such level.
    """
    column = INPUT_LEVELS.index(check_input_level(level))
    if any(isinstance(m, PlaneModule) for m in model.modules()):
        raise WeightError("the model is quantized already: smooth first, then quantize")
    data = list(batches)
    if not data:
        raise DataError("there are no batches to smooth by")
    found = find_weights(model)
    with frozen(model):
        nodes = _nodes(model, data[0], found)
        if objective is None:
            with torch.no_grad():
                objective = infer(run(model, data[0]))
        peaks, base = _measured(model, data, found, objective, nodes, column, progress)
        factors = {a: [_factors(node, peak, a) for node, peak in zip(nodes, peaks, strict=True)] for a in _STRENGTHS}
        losses = {}
        for strength, each in factors.items():
            _apply_all(nodes, each)
            try:
                losses[strength] = _measured(model, data, found, objective, nodes, column, progress)[1]
            finally:
                _apply_all(nodes, [1 / s_K for s_K in each])
        report = []
        for i, node in enumerate(nodes):
            best = min(_STRENGTHS, key=lambda a: losses[a][i])
            worth = losses[best][i] <= _MAX_REMAINING * base[i]
            if worth:
                _apply(node, factors[best][i])
            after = losses[best][i] if worth else base[i]
            report.append(Smoothed(node.name, node.layer_names, best if worth else 0.0, base[i], after))
    return tuple(report)


@dataclass(frozen=True, eq=False)
class _Node:
    name: str
    norm: nn.Module
    layer_names: tuple[str, ...]
    layers: tuple[nn.Module, ...]


def _nodes(model: nn.Module, batch: Any, found: Sequence[QuantizableWeight]) -> list[_Node]:
    """Norms whose output goes into linear layers only, each called once, with weights that no other module shares."""
    linear = {
        f.names[0]: f.modules[0]
        for f in found
        if len(f.names) == 1 and kind_of(f.modules[0]) in (Kind.LINEAR, Kind.LINEAR_TRANSPOSED)
    }
    norms = {n: m for n, m in model.named_modules() if n and _is_norm(m)}
    recorder = _UseRecorder({n: cast(Tensor, m.weight) for n, m in norms.items()})
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, norm in norms.items():

        def before(module: nn.Module, args: Any, name: str = name) -> None:
            recorder.layer = name

        def after(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            rows[name] = (args[0].detach().clone(), output.detach().clone())
            recorder.layer = None
            recorder.made(name, output)

        handles += [norm.register_forward_pre_hook(before), norm.register_forward_hook(after)]
    for name, layer in linear.items():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            recorder.norm = name
            recorder.calls[name] += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            recorder.norm = None

        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with torch.no_grad(), recorder:
            output = run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    recorder.used(tree_leaves(output))
    nodes = []
    for name, norm in norms.items():
        users = recorder.uses.get(name, set())
        once = recorder.calls[name] == 1 and all(recorder.calls[user] == 1 for user in users if user)
        if users and None not in users and once:
            names = tuple(sorted(cast("set[str]", users)))
            node = _Node(name, norm, names, tuple(linear[n] for n in names))
            if _scales(node, *rows[name]):
                nodes.append(node)
    return nodes


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


def _scales(node: _Node, x: Tensor, y: Tensor) -> bool:
    """Whether dividing the norm's parameters divides its output (some norms add 1 to their weight)."""
    s_K = 2.0 ** (torch.arange(y.shape[-1]) % 3)
    kept = {name: p.data.clone() for name, p in node.norm.named_parameters(recurse=False)}
    with torch.no_grad():
        for p in node.norm.parameters(recurse=False):
            p.div_(s_K)
        again: Tensor = node.norm(x)
        same = torch.equal(again * s_K, y)
        for name, p in node.norm.named_parameters(recurse=False):
            p.copy_(kept[name])
    return same


def _measured(
    model: nn.Module,
    data: Sequence[Any],
    found: Sequence[QuantizableWeight],
    objective: Objective,
    nodes: Sequence[_Node],
    column: int,
    progress: bool,
) -> tuple[list[Tensor], list[float]]:
    """(the greatest magnitude of each input channel behind each norm, the loss of the layers' inputs)."""
    peaks: list[Tensor] = [torch.zeros(len(cast(Tensor, node.norm.weight))) for node in nodes]
    handles = []
    for i, node in enumerate(nodes):

        def see(module: nn.Module, args: Any, output: Tensor, i: int = i) -> None:
            peaks[i] = torch.maximum(peaks[i], output.detach().float().abs().flatten(0, -2).amax(0))

        handles.append(node.norm.register_forward_hook(see))
    collector = Collector(found, objective, held=())
    try:
        for batch in track(data, "smoothing", show=progress):
            collector.add(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    losses = []
    for node in nodes:
        inputs = [collector.by_module[name].inputs for name in node.layer_names]
        losses.append(sum(float(s.losses(collector.samples)[0, column]) for s in inputs if s is not None))
    return peaks, losses


def _factors(node: _Node, peak_K: Tensor, strength: float) -> Tensor:
    """The factors that a norm is divided by, powers of two, [K]."""
    largest_K = torch.stack([weight_matrix(layer).abs().amax(0) for layer in node.layers]).amax(0)
    logs_K = strength * peak_K.clamp_min(1e-6).log2() - (1 - strength) * largest_K.clamp_min(1e-6).log2()
    return torch.exp2((logs_K - logs_K.median()).round_().clamp_(-12, 12))


def _apply_all(nodes: Sequence[_Node], factors: Sequence[Tensor]) -> None:
    for node, s_K in zip(nodes, factors, strict=True):
        _apply(node, s_K)


def _apply(node: _Node, s_K: Tensor) -> None:
    with torch.no_grad():
        for p in node.norm.parameters(recurse=False):
            p.div_(s_K.to(p.dtype))
        for layer in node.layers:
            weight = cast(Tensor, layer.weight)
            s = s_K.to(weight.dtype)
            weight.mul_(s[:, None] if kind_of(layer) is Kind.LINEAR_TRANSPOSED else s)
