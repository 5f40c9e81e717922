"""The layers of a model, derived from the names of its sites.

`model.layers.3.mlp.up_proj:weight` is the weight `mlp.up_proj` of the layer `model.layers.3`. A weight without a number
in its path is a layer by itself. A `Block` is a run of consecutive layers with the same weights; it is shown as a table
with a row for each layer and a column for each weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from foveate.formats.levels import TILE_LEVELS
from foveate.precision.maps import PrecisionMap, Site


@dataclass(frozen=True)
class Layer:
    """The weights of one layer.

    Attributes:
        name: the path of the layer, `model.layers.3`.
        parts: the name of each weight within the layer, `mlp.up_proj`; empty for a weight that is a layer by itself.
        sites: the weights, in order.
    """

    name: str
    parts: tuple[str, ...]
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Block:
    """Consecutive layers with the same parts."""

    parts: tuple[str, ...]
    layers: tuple[Layer, ...]


def module_path(site: Site) -> str:
    """The site's name without `:weight`."""
    return site.name.rpartition(":")[0] or site.name


def split_name(path: str) -> tuple[str, str]:
    """(layer, part): the path, cut after its first number if more words follow."""
    words = path.split(".")
    for index, word in enumerate(words[:-1]):
        if word.isdigit():
            return ".".join(words[: index + 1]), ".".join(words[index + 1 :])
    return path, ""


def layers_of(sites: Iterable[Site]) -> tuple[Layer, ...]:
    """The layers of a model's weights, in order of their first weight; inputs are left out."""
    layers: dict[str, list[tuple[str, Site]]] = {}
    for site in sites:
        if site.kind == "weight":
            layer, part = split_name(module_path(site))
            layers.setdefault(layer, []).append((part, site))
    return tuple(Layer(name, tuple(p for p, _ in own), tuple(s for _, s in own)) for name, own in layers.items())


def blocks_of(layers: Iterable[Layer]) -> tuple[Block, ...]:
    """The runs of consecutive layers with the same parts."""
    return tuple(Block(parts, tuple(run)) for parts, run in groupby(layers, key=lambda layer: layer.parts))


def shares(plan: PrecisionMap, sites: Iterable[Site]) -> dict[int, float]:
    """The share of the sites' tiles at each level, each tile weighted by its group size; the shares sum to 1."""
    sums = dict.fromkeys(TILE_LEVELS, 0)
    for site in sites:
        for level, tiles in plan.counts(site).items():
            sums[level] += tiles * site.group
    total = sum(sums.values()) or 1
    return {level: count / total for level, count in sums.items()}


def percent(share: float) -> str:
    """The share as `37%`, or `<1%` for a small share above 0."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def mean_level(plan: PrecisionMap, sites: Iterable[Site]) -> float:
    """The mean level of the sites' tiles, that is the bits of planes without scales."""
    return sum(level * share for level, share in shares(plan, sites).items())


def stored_bytes(plan: PrecisionMap, sites: Iterable[Site]) -> int:
    """Bytes of the sites' planes, scales, gains and tile levels."""
    return sum(plan.tile_bytes(s) + s.stored_overhead() for s in sites)


def dense_bytes(plan: PrecisionMap, width: int) -> int:
    """Bytes of the model with `width` bytes for each weight of a site (4 for float32), and the rest as it is."""
    return width * sum(s.weights for s in plan.weight_sites()) + plan.other_bytes
