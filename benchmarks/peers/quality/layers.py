"""The layers that are compared: their weights, second moments of their inputs, and how weights are put into a model.

Legend: N rows and K inputs of a weight; M rows of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.calibrate.one_weight import group_for
from foveate.collect.kinds import Kind, QuantizableWeight, find_weights, kind_of, patches, weight_matrix
from foveate.collect.objectives import Objective, run
from foveate.formats.levels import TOP_LEVEL
from foveate.planes import from_codes
from foveate.rounding import round_weight


@dataclass(frozen=True)
class Layers:
    """The weights that are compared, by the name of their module.

    Attributes:
        weights: float32 [N, K].
        moments: E[x x^T] of their inputs over the calibration data, float32 [K, K].
        gradients: E[g g^T] of their outputs' gradients, float32 [N, N], in no particular unit.
        left: names of the modules that stay float on both sides.
    """

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    left: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of weights in all layers."""
        return sum(w.numel() for w in self.weights.values())


def round_embeddings(model: nn.Module) -> list[QuantizableWeight]:
    """Round embeddings to our 8 bits in place, as both sides have them, and return the weights to be compared."""
    compared = []
    for candidate in find_weights(model):
        if any(kind_of(m) is Kind.EMBEDDING for m in candidate.modules):
            weight = cast(nn.Parameter, candidate.modules[0].weight)
            group = group_for(weight.shape[1])
            r = round_weight(weight, group=group)
            planes = from_codes(r.anchor, r.residual, r.scale, r.offset, r.gain, group=group, reach=r.reach)
            planes.active_levels.fill_(TOP_LEVEL)
            weight.data.copy_(planes.dequantize())
        else:
            compared.append(candidate)
    return compared


def gather(
    model: nn.Module, compared: Sequence[QuantizableWeight], batches: Sequence[Any], objective: Objective
) -> Layers:
    """Run the calibration data and collect second moments for every layer that the output depends on.

    They are those of the layer's inputs, and those of its outputs' gradients.
    """
    sums: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            is_conv = kind_of(module) is Kind.CONV

            def see_gradient(g: Tensor) -> None:
                g_MN = (g.transpose(1, -1) if is_conv else g).flatten(0, -2)
                gradients[name] = gradients.get(name, 0) + g_MN.t() @ g_MN

            output.register_hook(see_gradient)
            if is_conv:
                x_MK = patches(cast(nn.Conv2d, module), x)[:, 0].transpose(1, 2).flatten(0, 1)
            else:
                x_MK = x.flatten(0, -2)
            seen = x_MK.t() @ x_MK
            sums[name] = sums[name] + seen.double() if name in sums else seen.double()
            rows[name] = rows.get(name, 0) + len(x_MK)

        return see

    matters = _used_by_output(model, compared, batches[0], objective)
    usable = [f for f in matters if getattr(f.modules[0], "groups", 1) == 1]
    hooks = [f.modules[0].register_forward_hook(hook(f.names[0])) for f in usable]
    for i, batch in enumerate(batches):
        objective.loss(run(model, batch), batch, torch.Generator().manual_seed(i))[0].backward()
        model.zero_grad(set_to_none=True)
    for handle in hooks:
        handle.remove()
    reached = [f for f in usable if f.names[0] in sums]
    return Layers(
        {f.names[0]: weight_matrix(f.modules[0]).clone() for f in reached},
        {name: (total / rows[name]).float() for name, total in sums.items()},
        {name: total / rows[name] for name, total in gradients.items()},
        tuple(f.names[0] for f in compared if f.names[0] not in sums),
    )


def _used_by_output(
    model: nn.Module, compared: Sequence[QuantizableWeight], batch: Any, objective: Objective
) -> list[QuantizableWeight]:
    """The weights that the output depends on. A transformer may have a pooler whose output is not used."""
    weights = [cast(nn.Parameter, f.modules[0].weight).requires_grad_() for f in compared]
    with torch.enable_grad():
        total = objective.outcome(run(model, batch), batch).square().sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    return [f for f, gradient in zip(compared, gradients, strict=True) if gradient is not None]


def set_weights(model: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Give the named modules these weights, [N, K]."""
    for name, w_NK in dense.items():
        module = model.get_submodule(name)
        weight = cast(nn.Parameter, module.weight)
        turned = w_NK.t() if kind_of(module) is Kind.LINEAR_TRANSPOSED else w_NK
        weight.data.copy_(turned.reshape(weight.shape))
