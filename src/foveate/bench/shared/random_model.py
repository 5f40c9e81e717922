"""Models on planes with random codes, since the cost of loading and decoding does not depend on the values.

Nothing is quantized. The planes are made directly, so that a model of a billion weights takes seconds. Weights of one
shape have the same codes, each in memory of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from foveate.bench.shared.extras import require
from foveate.calibrate.one_weight import group_for
from foveate.collect.kinds import find_weights, weight_matrix_shape
from foveate.formats.levels import GAINED_LEVELS
from foveate.kernels.backends.table import ensure_loaded
from foveate.nn.decoder.fuse import fuse
from foveate.nn.experts import taken_apart
from foveate.nn.levels import apply
from foveate.nn.registry import Registry
from foveate.nn.replace import install, site_of
from foveate.nn.weight import PlaneWeight
from foveate.planes import PlaneTensor, from_codes, gathered
from foveate.precision.maps import uniform


def random_planes(rows: int, columns: int, generator: torch.Generator) -> PlaneTensor:
    """A weight of random codes, all planes stored and read."""
    group = group_for(columns)

    def codes() -> torch.Tensor:
        return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)

    scale = torch.full((rows, -(-columns // group)), 0.002, dtype=torch.float16)
    return from_codes(
        codes(), codes(), scale, torch.zeros_like(scale), torch.ones(len(GAINED_LEVELS), 1).half(), group=group, reach=0
    )


def _with_its_own_index(planes: PlaneTensor) -> PlaneTensor:
    return replace(
        planes,
        gain=planes.gain.clone(),
        stored_levels=planes.stored_levels.clone(),
        tile_offsets=planes.tile_offsets.clone(),
    )


def on_random_planes(model: nn.Module) -> nn.Module:
    """Give a model on the meta device planes of random codes, all of them, read at 8 bits.

    All other tensors become ones. The model is changed in place and returned.
    """
    ensure_loaded()
    with taken_apart(model):
        registry = _installed(model)
    model.to_empty(device="cpu")
    ours = {id(t) for weight in registry.weights.values() for t in weight.buffers()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in ours and tensor.is_floating_point():
            tensor.data.fill_(1.0)
    apply(model, uniform(registry.sites, 8, registry.other_bytes))
    fuse(model)
    return model.eval()


def _installed(model: nn.Module) -> Registry:
    """The registry of a model whose weights are random planes from now on."""
    found = find_weights(model)
    generator = torch.Generator().manual_seed(0)
    shapes = [weight_matrix_shape(f.modules[0]) for f in found]
    by_shape = {shape: random_planes(*shape, generator) for shape in sorted(set(shapes))}
    planes = [_with_its_own_index(p) for p in gathered([by_shape[shape] for shape in shapes])]
    sites = [site_of(f, p) for f, p in zip(found, planes, strict=True)]
    weights = {s.name: PlaneWeight(p, torch.float32) for s, p in zip(sites, planes, strict=True)}
    return install(model, found, sites, weights)


def random_llama(**config: Any) -> nn.Module:
    """A Llama on random planes.

    Args:
        config: the arguments of `transformers.LlamaConfig`.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    return on_random_planes(model)
