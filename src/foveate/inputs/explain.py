"""explain: what one input made of the model: the level of each weight for each token, and why.

Shapes: M rows of an input (tokens, or patches of images), T tiles of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import run
from foveate.inputs.multiplier import Shares
from foveate.inputs.observe import Observed, observing
from foveate.kernels.planes.inputs import quantize_input
from foveate.nn.registry import registry_of
from foveate.precision.maps import PrecisionMap


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerConfig:
    """How one weight and its input were read for one row.

    Attributes:
        site, input_site: the weight and its input.
        bits: the mean level of the weight's tiles.
        input_bits: the level of the input.
        scale: the step of the input's codes; 0 where the row is not quantized. At level 4 blocks of 32 inputs have a
            step of 1 to 8 times this unit.
        zero_point: the code of 0; None at level 4, where each block has its own.
        estimated, true: the loss that the lower map would add, as estimated and from all outputs.
        reads_high: whether the row read the higher map.
    """

    site: str
    input_site: str
    bits: float
    input_bits: int
    scale: float
    zero_point: int | None
    estimated: float
    true: float
    reads_high: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerExplanation:
    """What one product did with its input.

    Attributes:
        site, input_site: the weight and its input.
        rows: the shape that the rows have in the model, such as [batch, tokens].
        reads_high: bool [M], which rows read the higher map.
        estimated, true: float32 [M], the loss that the lower map would add, as estimated and from all outputs.
        threshold: the estimate above which a row reads the higher map.
        levels: the mean level of the weight's tiles in the lower and in the higher map.
        input_levels: the level of the input in the lower and in the higher map.
        scales: float32 [2, M], the step of the input's codes at each of these levels; 0 at 32 bits.
    """

    site: str
    input_site: str
    rows: torch.Size
    reads_high: Tensor
    estimated: Tensor
    true: Tensor
    threshold: float
    levels: tuple[float, float]
    input_levels: tuple[int, int]
    scales: Tensor

    @property
    def bits(self) -> Tensor:
        """The mean level that each row read, float32 [M]."""
        low, high = self.levels
        return torch.where(self.reads_high, high, low)


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """What one input made of the model.

    Attributes:
        layers: of every product that was computed, in order.
        low, high: the two maps.
        output: of the model.
    """

    layers: tuple[LayerExplanation, ...]
    low: PrecisionMap
    high: PrecisionMap
    output: Any

    @property
    def precision_map(self) -> Mapping[str, Tensor]:
        """For each weight site the map that each row read: bool [M], true for the higher one."""
        return {layer.site: layer.reads_high for layer in self.layers}

    def layer_config(self, site: str, row: int) -> LayerConfig:
        """How a weight was read for one row.

        Args:
            site: the weight, as in `model.layers.3.mlp.up_proj:weight`.
            row: the number of the row.

        Raises:
            KeyError: no product with this weight was computed.
        """
        layer = next((one for one in self.layers if one.site == site), None)
        if layer is None:
            raise KeyError(f"site (={site!r}) was not multiplied with anything")
        reads_high = bool(layer.reads_high[row])
        level = layer.input_levels[reads_high]
        return LayerConfig(
            site=site,
            input_site=layer.input_site,
            bits=layer.levels[reads_high],
            input_bits=level,
            scale=float(layer.scales[int(reads_high), row]),
            zero_point=None if level == 4 else 0,
            estimated=float(layer.estimated[row]),
            true=float(layer.true[row]),
            reads_high=reads_high,
        )

    @property
    def token_bits(self) -> Tensor:
        """The mean bits of a weight that each token read, float32 [M]: over the products whose rows are the tokens.

        They are the first rows that the most products have in common.
        """
        counts: dict[int, int] = {}
        for layer in self.layers:
            counts[len(layer.reads_high)] = counts.get(len(layer.reads_high), 0) + 1
        rows = max(counts, key=lambda count: counts[count]) if counts else 0
        more = Shares.between(self.low, self.high).more
        mine = [layer for layer in self.layers if len(layer.reads_high) == rows]
        bits = torch.full((rows,), self.low.bits + sum(more.values()) - sum(more[layer.site] for layer in mine))
        for layer in mine:
            bits += more[layer.site] * layer.reads_high.float()
        return bits

    def __str__(self) -> str:
        lines = [f"{'weight':40} {'levels':>13} {'high':>6} {'estimated':>10} {'true':>10} {'threshold':>10}"]
        for layer in self.layers:
            share = float(layer.reads_high.float().mean()) if len(layer.reads_high) else 0.0
            levels = f"{layer.levels[0]:.2f}..{layer.levels[1]:.2f}"
            estimated, true = float(layer.estimated.mean()), float(layer.true.mean())
            lines.append(
                f"{layer.site.removesuffix(':weight'):40} {levels:>13} {share:6.1%} {estimated:10.3g} {true:10.3g}"
                f" {layer.threshold:10.3g}"
            )
        return "\n".join(lines)


def explain(model: nn.Module, input: Any) -> Explanation:
    """Run one input, and say for each product and row which map was read, and the errors that decided.

        with fv.adapt_to_input(model, bits=4.0, batches=batches):
            print(fv.explain(model, {"input_ids": ids}))

    Args:
        model: a quantized model whose inputs choose (`foveate.adapt_to_input`).
        input: a batch, as for `foveate.quantize`.

    Raises:
        FoveateError: inputs of the model do not choose.
    """
    found: list[LayerExplanation] = []
    low, high = chosen_maps(model)
    weights = {site.name: site for site in low.weight_sites()}

    def take(seen: Observed) -> None:
        site = weights[seen.site]
        levels = (cast(int, low.levels[seen.input_site]), cast(int, high.levels[seen.input_site]))
        found.append(
            LayerExplanation(
                site=seen.site,
                input_site=seen.input_site,
                rows=seen.rows,
                reads_high=seen.takes_high,
                estimated=seen.errors,
                true=torch.zeros_like(seen.errors) if seen.true_errors is None else seen.true_errors,
                threshold=seen.threshold,
                levels=(low.mean_level(site), high.mean_level(site)),
                input_levels=levels,
                scales=_steps(seen, levels),
            )
        )

    with evaluating(model), torch.no_grad(), observing(model, take, true_errors=True):
        output = run(model, input)
    return Explanation(layers=tuple(found), low=low, high=high, output=output)


def chosen_maps(model: nn.Module) -> tuple[PrecisionMap, PrecisionMap]:
    """The lower and the higher map that inputs choose between, of rows for which nothing was asked."""
    composed = registry_of(model).generations.composed
    assert composed is not None
    low, high = composed.pairs[0]
    return composed.maps[low], composed.maps[high]


def _steps(seen: Observed, levels: tuple[int, int]) -> Tensor:
    """The step of each row's codes at each of two levels of the input, float32 [2, M]; 0 at 32 bits."""
    x_MK = seen.x.reshape(-1, seen.x.shape[-1]).float()
    steps = [
        x_MK.new_zeros(len(x_MK)) if level == 32 else quantize_input(x_MK, level, seen.limits)[1][:, 0]
        for level in levels
    ]
    return torch.stack(steps)
