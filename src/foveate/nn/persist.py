"""save and load: a whole model to a folder and back.

A transformers model is rebuilt from its configuration (without weights, and without running any code but transformers'
own); any other module is given as a skeleton, whose weights need not even be allocated (`with torch.device("meta"):
model = ...`).
"""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate import checkpoint
from foveate.allocate import allocate
from foveate.checkpoint import Folder, Head, PathLike
from foveate.checkpoint.head import DTYPES
from foveate.collect.kinds import PRODUCT, Found, kind_of, parts_of_adapters, weight_matrix_shape
from foveate.errors import CheckpointError, SiteError
from foveate.formats.levels import TOP_LEVEL
from foveate.kernels.dispatch import ensure_loaded
from foveate.maps import Budget, PrecisionMap, tile_levels, uniform
from foveate.nn import sentence_transformer
from foveate.nn.derived import products_apart
from foveate.nn.experts import taken_apart
from foveate.nn.fold import fold_skeleton, folded_of
from foveate.nn.install import install
from foveate.nn.modules import PlaneModule, PlaneWeight
from foveate.nn.registry import Registry, quantized_part, registry_of
from foveate.nn.skeleton import skeleton
from foveate.sizes import parse_bytes

#: Files of a tokenizer or processor, copied along from the folder a model came from.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.*",
    "preprocessor_config.json",
    "chat_template*",
)


def save(model: nn.Module, path: PathLike, *, keep: PrecisionMap | None = None) -> None:
    """Write a quantized model to a folder.

    The default map in the folder is `keep`, or the map in force. An existing checkpoint is replaced as a whole or not
    at all, whatever interrupts.

    Args:
        model: a quantized model.
        path: the folder; made if it does not exist.
        keep: keep only the planes that this map reads; everything the model has if not given.

    Raises:
        CheckpointError: the folder cannot be written (a full disk, say), a parameter holds NaN or Inf, or modules were
            put around layers of the model since it was quantized, as adapters are; what was there before is still
            there.
        PlaneNotResidentError: the model does not have the planes of `keep`.
    """
    model = quantized_part(model)
    registry = registry_of(model)
    plan = keep if keep is not None else cast("tuple[PrecisionMap, PrecisionMap]", registry.applied)[0]
    registry.check(plan)
    _check_in_place(model, registry)
    rest = _rest(model)
    for name, _ in model.named_parameters():
        if name in rest and not is_finite(rest[name]):
            raise CheckpointError(f"parameter {name} holds NaN or Inf: a folder with it could not be loaded")
    weights = {name: w.value for name, w in registry.weights.items()}
    if keep is not None:
        weights = {name: w.kept(_level_tiles(keep, name, w.resident)) for name, w in weights.items()}
    about, companions = _about(model)
    checkpoint.write(
        path,
        weights=weights,
        dtypes={name: str(w.dtype).removeprefix("torch.") for name, w in registry.weights.items()},
        rest=rest,
        plan=replace(plan, other_parameters=registry.other_parameters),
        profile=registry.profile,
        model={
            **about,
            **({"folded": folded_of(model)} if folded_of(model) else {}),
            **({"ranges": registry.ranges} if registry.ranges else {}),
        },
        extra_files=companions,
    )


def _check_in_place(model: nn.Module, registry: Registry) -> None:
    """Raise unless every layer is where its site says: elsewhere no load would find it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in registry.inputs.items():
        place = name.removesuffix(":input")
        found = modules.get(place)
        if layer not in (found, modules.get(f"{place}.{PRODUCT}")):
            raise CheckpointError(
                f"{place} is {type(found).__name__} now, put there since the model was quantized: save adapters "
                "by themselves (peft's save_pretrained), and the model before they are put on or after they are taken "
                "off (peft's unload)"
            )


def load(
    path: PathLike,
    *,
    keep: PrecisionMap | int | None = None,
    memory: int | str | None = None,
    model: nn.Module | None = None,
) -> nn.Module:
    """Read a model from a folder, in evaluation mode.

    Args:
        path: what `save` wrote.
        keep: load only the planes that this map, or this level everywhere, reads, and apply it. If not given, load
            everything and apply the folder's default map.
        memory: load the best map that fits in these bytes, `"6GiB"` or a number.
        model: the skeleton to fill, for models that are not transformers' (nor a SentenceTransformer of the usual
            modules: a transformer, pooling, normalization).

    Raises:
        CheckpointError: the folder is missing, damaged, of a newer version, or not of this model.
        SiteError: `keep` is a map of another model.
        PlaneNotResidentError: the folder does not hold the planes asked for.
        BudgetError: nothing fits in `memory`; the message says the least possible.
    """
    ensure_loaded()
    with checkpoint.opened(path) as folder:
        return _load(folder, keep, memory, model)


def _load(
    folder: Folder, keep: PrecisionMap | int | None, memory: int | str | None, model: nn.Module | None
) -> nn.Module:
    head, path = folder.head, folder.path
    if memory is not None:
        if keep is not None:
            raise CheckpointError("give keep or memory, not both")
        keep = checkpoint.at_most_stored(folder, _fitting(folder, parse_bytes(memory)))
    if isinstance(keep, int):
        keep = replace(uniform(head.sites, keep, head.other_bytes), other_parameters=head.other_parameters)
    if keep is not None and keep.sites != head.sites:
        raise SiteError(f"the map is of another model than {path}")
    if model is None:
        model = skeleton(folder)
    fold_skeleton(model, head.model.get("folded", ()))
    planes = checkpoint.read_planes(folder, keep)
    weights = {name: PlaneWeight(p, _dtype(head.dtype[name])) for name, p in planes.items()}
    sites = head.weight_sites()
    names = frozenset(n.removesuffix(":weight") for s in sites for n in (s.name, *s.aliases))
    with taken_apart(model, _stacks(head)), products_apart(model, names):
        found = [_found(model, (s.name, *s.aliases), s.rows, s.columns) for s in sites]
        registry = install(model, found, sites, weights)
    _fill(model, folder)
    if registry.sites != head.sites:
        raise CheckpointError(f"{path} is not of this model: its sites differ")
    registry.other_bytes = head.other_bytes
    registry.set_ranges(_ranges(path, head, registry))
    if head.profile is not None:
        registry.profile_source = checkpoint.profile_later(folder)
    plan = head.plan if keep is None else keep
    registry.apply(plan, plan)
    return model.eval()


def _ranges(path: PathLike, head: Head, registry: Registry) -> dict[str, tuple[float, float]]:
    """The static scales of inputs that a folder keeps."""
    kept = head.model.get("ranges", {})
    if not isinstance(kept, dict) or not set(kept) <= set(registry.inputs):
        raise CheckpointError(f"{path}: the ranges in its head are not of this model's inputs")
    for name, limits in kept.items():
        fine = isinstance(limits, list) and len(limits) == 2 and all(type(v) in (int, float) for v in limits)
        if not fine or not -1e38 < limits[0] <= limits[1] < 1e38:
            raise CheckpointError(f"{path}: the range of {name} (={limits!r}) is not two finite numbers")
    return {name: (float(low), float(high)) for name, (low, high) in kept.items()}


def _fitting(folder: Folder, memory: int) -> PrecisionMap:
    profile = checkpoint.read_profile(folder)
    top = profile.uniform(TOP_LEVEL)
    return top if top.bytes_resident <= memory else allocate(profile, Budget(bytes=memory))


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or Inf."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    # eight bits cannot be asked themselves
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())


def _level_tiles(plan: PrecisionMap, name: str, resident: Tensor) -> Tensor:
    levels = bytearray(tile_levels(plan.levels[name], resident.numel()))
    return torch.frombuffer(levels, dtype=torch.uint8).view_as(resident)


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are not on planes, those that state_dict leaves out included."""
    rest: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, PlaneWeight):
            continue
        own = {**module._parameters, **({} if isinstance(module, PlaneModule) else module._buffers)}
        rest.update({f"{prefix}.{name}".lstrip("."): t.detach() for name, t in own.items() if t is not None})
    # what shares memory is written once each: a file format without pointers
    seen: dict[int, str] = {}
    for name, t in list(rest.items()):
        if t.numel() and seen.setdefault(t.untyped_storage().data_ptr(), name) != name:
            rest[name] = t.clone()
    return rest


def _about(model: nn.Module) -> tuple[dict[str, Any], dict[str, bytes]]:
    """How to rebuild the model, and the files to put beside it."""
    inner = sentence_transformer.transformer_in(model)
    if inner is not None:
        about, files = _about(inner)
        described = sentence_transformer.description(model)
        return {**about, "sentence_transformer": described}, {**files, **sentence_transformer.tokenizer_files(model)}
    if not type(model).__module__.startswith("transformers.") or parts_of_adapters(model):
        return {}, {}
    config = cast(Any, model).config
    named = copy(config)
    named.architectures = [type(model).__name__]  # as save_pretrained has it; a model made of a configuration has none
    texts = {"config": named.to_json_string(use_diff=False)}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        texts["generation_config"] = generation.to_json_string()
    files = {f"{what}.json": text.encode() for what, text in texts.items()}
    source = Path(getattr(config, "_name_or_path", "") or "")
    if source.name and source.is_dir():
        for pattern in _COMPANIONS:
            files.update({f.name: f.read_bytes() for f in source.glob(pattern) if f.is_file()})
    # load reads the copies in the head, which changes in one step with all the rest; the files are for other programs
    return {"transformers": type(model).__name__, **{what: json.loads(text) for what, text in texts.items()}}, files


def _stacks(head: Head) -> frozenset[str]:
    """Layers of which the checkpoint has single experts: `a.b` of a site `a.b.5.down_proj:weight`."""
    return frozenset(s.name.rpartition(".")[0].rpartition(".")[0] for s in head.weight_sites())


def _found(model: nn.Module, site_names: tuple[str, ...], rows: int, columns: int) -> Found:
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
    return Found(names, tuple(modules))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name!r} is not a dtype")
    return dtype


def _fill(model: nn.Module, folder: Folder) -> None:
    """Put the tensors that are not on planes into their places; what the model shares stays shared."""
    filled: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones too, so that none is freed and its id used again
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
        if isinstance(old, nn.Parameter) and not is_finite(tensor):  # buffers may: masks are full of Inf
            raise CheckpointError(f"{full_name} of the checkpoint holds NaN or Inf")
        new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        _, first = filled.setdefault(id(old), (old, new))
        place[name] = first if torch.equal(first, new) else new
    for module in model.modules():
        if isinstance(module, PlaneModule):  # what shared its parameters with others still does once it is plain again
            own: dict[str, Any] = module.origin.module._parameters
            own.update({name: filled[id(old)][1] for name, old in own.items() if id(old) in filled})
    if hasattr(model, "tie_weights") and any(p.is_meta for p in model.parameters()):
        cast(Any, model).tie_weights()
    empty = [name for name, t in _rest(model).items() if t.is_meta or name not in folder.head.checksums["rest"]]
    if empty:
        raise CheckpointError(
            f"the checkpoint has nothing for {', '.join(empty[:5])}{' and others' if len(empty) > 5 else ''}"
        )
