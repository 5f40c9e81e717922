"""Replacing a model's modules by modules on planes, and giving the model its registry.

This is the last step of `foveate.quantize` and the middle of `foveate.load`, which then fills in what is not on planes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from foveate.collect.kinds import Kind, QuantizableWeight, kind_of
from foveate.nn.fused_group import hooked_scopes
from foveate.nn.modules import on_planes
from foveate.nn.passes import hooked_passes
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import Hooks, Registry, attach, linear_layers
from foveate.nn.weight import PlaneWeight
from foveate.planes import PlaneTensor
from foveate.precision.maps import Site


def site_of(entry: QuantizableWeight, planes: PlaneTensor, share: float = 1.0) -> Site:
    """The site of a weight.

    Args:
        entry: the modules that hold the weight.
        planes: the weight.
        share: the share of tokens that read it; less than 1 for an expert, which is not routed every token.
    """
    return Site(
        name=f"{entry.names[0]}:weight",
        kind="weight",
        rows=planes.rows,
        columns=planes.columns,
        group=planes.group,
        row_gains=planes.gain.shape[1] > 1,
        rows_read=1 if entry.is_embedding_only else round(share * planes.rows),
        aliases=tuple(f"{name}:weight" for name in entry.names[1:]),
    )


def install(
    model: nn.Module, found: Sequence[QuantizableWeight], sites: Sequence[Site], weights: dict[str, PlaneWeight]
) -> Registry:
    """Replace the modules of `found` by modules on planes, and attach the registry.

    Args:
        model: the model, changed in place.
        found: the modules that hold each weight.
        sites: the site of each, in the same order.
        weights: the weight of each, by the site's name.
    """
    inputs: dict[str, PlaneModule] = {}
    all_sites = list(sites)
    places: dict[int, list[str]] = {}  # all names of each module, for one may be registered several times
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for entry, site in zip(found, sites, strict=True):
        weights[site.name].name = site.name
        for name, module in zip(entry.names, entry.modules, strict=True):
            new = on_planes(module, weights[site.name])
            for place in places[id(module)]:
                replace_module(model, place, new)
            if kind_of(module) is not Kind.EMBEDDING:
                inputs[f"{name}:input"] = new
                all_sites.append(Site(f"{name}:input", "input", 0, site.columns))
    hooks = Hooks(passes=hooked_passes(model), scopes=hooked_scopes(model, linear_layers(inputs)))
    registry = Registry(all_sites, weights, inputs, hooks, _other_bytes(model, weights), _other_parameters(model))
    attach(model, registry)
    return registry


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module that has this name by `new`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _other_parameters(model: nn.Module) -> dict[str, int]:
    """How many parameters are not on planes, by the class of the module that holds them."""
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        kind = "biases" if isinstance(module, PlaneModule) else type(module).__name__
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[kind] = counts.get(kind, 0) + parameter.numel()
    return counts


def _other_bytes(model: nn.Module, weights: dict[str, PlaneWeight]) -> int:
    """Bytes of every parameter and buffer that does not belong to a site."""
    on_sites = {id(t) for w in weights.values() for t in w.buffers()}
    other = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in on_sites}
    return sum(t.numel() * t.element_size() for t in other.values())
