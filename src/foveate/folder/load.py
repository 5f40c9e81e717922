"""load: a whole model from a folder.

A model starts as a *skeleton*, its modules without their weights. For a transformers model it is built from the
configuration in the folder, and no code but that of transformers is run (`foveate.folder.skeleton`). Any other skeleton
is an argument, and its weights need not be allocated (`with torch.device("meta"): model = ...`). Its modules are then
replaced by modules on planes, and the other tensors are read into their places.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from foveate import checkpoint
from foveate.checkpoint import Folder, PathLike
from foveate.errors import CheckpointError, DeviceError, SiteError
from foveate.folder.rebuild import keep_ranges, on_planes_of
from foveate.kernels.backends.table import ensure_loaded
from foveate.memory.allocator import given_back
from foveate.memory.streaming import StreamingResidency
from foveate.nn.decoder.fuse import fuse
from foveate.nn.residency.attach import make_resident
from foveate.nn.residency.following import AUTO, first_limit, start_following
from foveate.precision.maps import PrecisionMap, uniform
from foveate.sizes import parse_bytes


def load(
    path: PathLike,
    *,
    keep: PrecisionMap | int | None = None,
    memory: int | str | None = None,
    strict: bool = False,
    model: nn.Module | None = None,
) -> nn.Module:
    """Read a model from a folder, in evaluation mode.

    Args:
        path: a folder that `save` wrote.
        keep: load only the planes that this map, or this level everywhere, reads, and apply it. If not given, load all
            planes and apply the default map of the folder.
        memory: what the model may take, `"6GiB"` or a number of bytes, or `"auto"` for what is free. Planes that do not
            fit stay on disk, and come and go as `foveate.resize` and the maps in force say (docs/memory.md).
        strict: with `memory`, have calls wait for planes that are not in memory, instead of reading fewer bits.
        model: the skeleton to fill, for models that are not transformers' (nor a SentenceTransformer of the usual
            modules: a transformer, pooling, normalization).

    Raises:
        CheckpointError: the folder is missing, damaged, of a newer version, or not of this model.
        SiteError: `keep` is a map of another model.
        PlaneNotResidentError: the folder does not store the planes of `keep`.
        BudgetError: `memory` is less than the least possible, which the message says.
    """
    ensure_loaded()
    if memory is not None and keep is not None:
        raise CheckpointError("give keep or memory, not both")
    if strict and memory is None:
        raise CheckpointError("strict says what calls do about planes on disk: give memory too")
    with checkpoint.opened(path) as folder:
        if memory is not None:
            return _load_within(folder, memory, strict, model)
        return _load(folder, keep, model)


def _load(folder: Folder, keep: PrecisionMap | int | None, model: nn.Module | None) -> nn.Module:
    head, path = folder.head, folder.path
    if isinstance(keep, int):
        keep = replace(uniform(head.sites, keep, head.other_bytes), other_parameters=head.other_parameters)
    if keep is not None and keep.sites != head.sites:
        raise SiteError(f"the map is of another model than {path}")
    model, registry = on_planes_of(folder, checkpoint.read_planes(folder, keep), model)
    plan = head.plan if keep is None else keep
    registry.apply(plan)
    keep_ranges(folder, registry)
    fuse(model)
    return model.eval()


def _load_within(folder: Folder, memory: int | str, strict: bool, model: nn.Module | None) -> nn.Module:
    """A model whose planes stay on disk where they do not fit."""
    limit = first_limit().limit if memory == AUTO else parse_bytes(memory)
    if ensure_loaded().isa is None:
        raise DeviceError("planes on disk need compiled kernels: foveate.backends() says why this machine has none")
    with given_back(True):
        tiers = checkpoint.read_tiers(folder)
        residency = StreamingResidency(tiers.held, limit=limit, importance=tiers.importance)
        model, _ = on_planes_of(folder, tiers.weights, model)
        registry = make_resident(model, residency, tiers, strict=strict)
        registry.default = folder.head.plan
        registry.fill()
        keep_ranges(folder, registry)
    if memory == AUTO:
        start_following(registry)
    fuse(model)
    return model.eval()
