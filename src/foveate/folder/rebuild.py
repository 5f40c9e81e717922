"""A model from an open folder: its skeleton, modules on planes in it, and every other tensor read into its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate import checkpoint
from foveate.checkpoint import Folder, Head, PathLike
from foveate.checkpoint.head import DTYPES
from foveate.collect.kinds import PRODUCT, QuantizableWeight, kind_of, weight_matrix_shape
from foveate.errors import CheckpointError
from foveate.folder.known_frontier import keep_frontier
from foveate.folder.save import _rest, is_finite
from foveate.folder.skeleton import skeleton
from foveate.nn.experts import taken_apart
from foveate.nn.foreign.derived import split_derived
from foveate.nn.foreign.folded import fold_skeleton
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import Registry
from foveate.nn.replace import install
from foveate.nn.weight import PlaneWeight
from foveate.planes import PlaneTensor


def on_planes_of(
    folder: Folder, planes: Mapping[str, PlaneTensor], model: nn.Module | None
) -> tuple[nn.Module, Registry]:
    """A model of an open folder with these weights, and its registry; no map is applied yet."""
    head, path = folder.head, folder.path
    if model is None:
        model = skeleton(folder)
    fold_skeleton(model, head.model.get("folded", ()))
    weights = {name: PlaneWeight(p, _dtype(head.dtype[name])) for name, p in planes.items()}
    sites = head.weight_sites()
    names = frozenset(n.removesuffix(":weight") for s in sites for n in (s.name, *s.aliases))
    with taken_apart(model, _stacks(head)), split_derived(model, names):
        found = [_found(model, (s.name, *s.aliases), s.rows, s.columns) for s in sites]
        registry = install(model, found, sites, weights)
    _fill(model, folder)
    if registry.sites != head.sites:
        raise CheckpointError(f"{path} is not of this model: its sites differ")
    registry.other_bytes = head.other_bytes
    if head.profile is not None:
        registry.profile_source = checkpoint.profile_later(folder)
    if head.frontier is not None:
        keep_frontier(model, checkpoint.frontier_later(folder))
    return model, registry


def keep_ranges(folder: Folder, registry: Registry) -> None:
    """Give the inputs of a model, which has a map in force, the static scales that a folder stores."""
    registry.set_ranges(_ranges(folder.path, folder.head, registry))


def _ranges(path: PathLike, head: Head, registry: Registry) -> dict[str, tuple[float, float]]:
    """The ranges of inputs with static scales that a folder stores."""
    stored = head.model.get("ranges", {})
    if not isinstance(stored, dict) or not set(stored) <= set(registry.inputs):
        raise CheckpointError(f"{path}: the ranges in its head are not of this model's inputs")
    for name, limits in stored.items():
        is_range = isinstance(limits, list) and len(limits) == 2 and all(type(v) in (int, float) for v in limits)
        if not is_range or not -1e38 < limits[0] <= limits[1] < 1e38:
            raise CheckpointError(f"{path}: the range of {name} (={limits!r}) is not two finite numbers")
    return {name: (float(low), float(high)) for name, (low, high) in stored.items()}


def _stacks(head: Head) -> frozenset[str]:
    """The layers whose experts may be sites of their own: `a.b` for a site `a.b.5.down_proj:weight`."""
    return frozenset(s.name.rpartition(".")[0].rpartition(".")[0] for s in head.weight_sites())


def _found(model: nn.Module, site_names: tuple[str, ...], rows: int, columns: int) -> QuantizableWeight:
    names = tuple(name.removesuffix(":weight") for name in site_names)
    modules = []
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"the model has no module {name!r}, which the checkpoint has planes for") from error
        module = module._modules.get(PRODUCT) or module
        if kind_of(module) is None or weight_matrix_shape(module) != (rows, columns):
            raise CheckpointError(
                f"{name} of the model does not hold a weight of {rows} x {columns}, as the checkpoint has"
            )
        modules.append(module)
    return QuantizableWeight(names, tuple(modules))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name!r} is not a dtype")
    return dtype


def _fill(model: nn.Module, folder: Folder) -> None:
    """Read the tensors that are not on planes into their places. Tensors that the model shares stay shared."""
    filled: dict[int, tuple[Tensor, Tensor]] = {}  # the old tensors are kept too: a freed one's id could be used again
    entries = folder.part("rest").entries
    for full_name in folder.head.checksums["rest"]:
        prefix, _, name = full_name.rpartition(".")
        try:
            module = model.get_submodule(prefix)
        except AttributeError as error:
            raise CheckpointError(
                f"the model has no module {prefix!r}, which the checkpoint has {name!r} for"
            ) from error
        place: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        old, entry = place.get(name), entries.get(full_name)
        if entry is None:
            raise CheckpointError(f"{folder.path} is damaged: it holds no {full_name!r}")
        if old is None or old.shape != entry.shape:  # before any of its bytes are read
            have = "missing" if old is None else tuple(old.shape)
            raise CheckpointError(f"{full_name} of the model is {have}, of the checkpoint {entry.shape}")
        tensor = folder.read("rest", full_name, entry.size)
        known = str(tensor.dtype).removeprefix("torch.") in DTYPES
        if tensor.is_floating_point() and not known and tensor.dtype != old.dtype:
            raise CheckpointError(f"{full_name} of the checkpoint is {tensor.dtype}, which the model cannot be run in")
        if tensor.is_floating_point() != old.is_floating_point():
            raise CheckpointError(f"{full_name} of the model is {old.dtype}, of the checkpoint {tensor.dtype}")
        if isinstance(old, nn.Parameter) and not is_finite(tensor):  # buffers may hold Inf: masks do
            raise CheckpointError(f"{full_name} of the checkpoint holds NaN or Inf")
        new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        _, first = filled.setdefault(id(old), (old, new))
        place[name] = first if torch.equal(first, new) else new
    for module in model.modules():
        if isinstance(module, PlaneModule):  # its origin shares parameters as before, for `foveate.dequantize`
            own: dict[str, Any] = module.origin.module._parameters
            own.update({name: filled[id(old)][1] for name, old in own.items() if id(old) in filled})
    if hasattr(model, "tie_weights") and any(p.is_meta for p in model.parameters()):
        try:
            cast(Any, model).tie_weights()
        except AttributeError as error:  # to a weight that is on planes
            raise CheckpointError(f"the model ties weights that the checkpoint does not: {error}") from error
    empty = [name for name, t in _rest(model).items() if t.is_meta or name not in folder.head.checksums["rest"]]
    if empty:
        raise CheckpointError(
            f"the checkpoint has nothing for {', '.join(empty[:5])}{' and others' if len(empty) > 5 else ''}"
        )
