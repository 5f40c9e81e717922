"""save: a whole quantized model to a folder.

The planes are written with what else the model needs: the parameters and buffers that are not on planes, the profile,
and for a transformers model its configuration, and its tokenizer from the folder that the model came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate import checkpoint
from foveate.checkpoint import PathLike, StoredWeight, stored_weight
from foveate.checkpoint.frontier import check_stored
from foveate.collect.kinds import PRODUCT, parts_of_adapters
from foveate.errors import CheckpointError, PlaneNotResidentError
from foveate.folder import sentence_transformer
from foveate.folder.known_frontier import known_frontier
from foveate.nn.foreign.folded import folded_of
from foveate.nn.levels import state_of
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import Registry, quantized_part, registry_of
from foveate.nn.residency.registry import ResidentRegistry
from foveate.nn.weight import PlaneWeight
from foveate.planes import PlaneTensor
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap, tile_levels

#: The quantizer that `config.json` names to transformers (`foveate.pretrained`).
QUANT_METHOD = "foveate"
_CONFIG = "config.json"
#: Files of a tokenizer or processor, copied from the folder that a model came from.
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


def save(
    model: nn.Module, path: PathLike, *, keep: PrecisionMap | None = None, frontier: Frontier | None = None
) -> None:
    """Write a quantized model to a folder.

    The default map in the folder is `keep`, or the map in force. An existing checkpoint is replaced as a whole or not
    at all, whatever interrupts.

    Args:
        model: a quantized model.
        path: the folder; made if it does not exist.
        keep: store only the planes that this map reads; all that the model has if not given. A model that was loaded
            with `memory=` has all that its folder stores: what is not in memory is copied from there.
        frontier: store this frontier beside the model; `foveate.frontier_of` gives it back after loading. If not given,
            the frontier that the model was loaded with is stored again, unless `keep` leaves out planes that it reads.

    Raises:
        CheckpointError: the folder cannot be written (for example, the disk is full), a parameter holds NaN or Inf, or
            modules like adapters were put around layers of the model since it was quantized. A checkpoint that was
            there before is unchanged.
        PlaneNotResidentError: the model does not store the planes of `keep`, or those that are stored are not all that
            `frontier` reads.
        SiteError: `keep` or `frontier` is of another model.
    """
    model = quantized_part(model)
    registry = registry_of(model)
    resident = registry if isinstance(registry, ResidentRegistry) else None
    plan = keep if keep is not None else registry.wanted if resident is None else resident.decided
    assert plan is not None
    registry.check(plan)
    _check_in_place(model, registry)
    rest = _rest(model)
    for name, _ in model.named_parameters():
        if name in rest and not is_finite(rest[name]):
            raise CheckpointError(f"parameter {name} holds NaN or Inf: a folder with it could not be loaded")
    weights: dict[str, PlaneTensor | StoredWeight] = {}
    for name, w in registry.weights.items():
        levels = None if keep is None else _level_tiles(keep, name, w.value.stored_levels)
        if resident is not None:
            weights[name] = stored_weight(resident.tiers, name, levels)
        else:
            weights[name] = w.value if levels is None else w.value.kept(levels)
    about, companions = _about(model)
    frontier = _frontier_to_store(model, registry, frontier, {name: w.highest_levels for name, w in weights.items()})
    checkpoint.write(
        path,
        weights=weights,
        dtypes={name: str(w.dtype).removeprefix("torch.") for name, w in registry.weights.items()},
        rest=rest,
        plan=replace(plan, other_parameters=registry.other_parameters),
        measured=checkpoint.Measurements(profile=registry.profile, frontier=frontier),
        model={
            **about,
            **({"folded": folded_of(model)} if folded_of(model) else {}),
            **({"ranges": dict(ranges)} if (ranges := state_of(model).ranges) else {}),
        },
        extra_files=lambda files: _for_transformers(companions, files["rest"], registry),
    )


def _frontier_to_store(
    model: nn.Module, registry: Registry, given: Frontier | None, stored: dict[str, Tensor]
) -> Frontier | None:
    """The frontier that a folder with these stored levels is to hold, checked; see `save`."""
    if given is not None:
        registry.check(given[0])
        check_stored(given, stored)
        return given
    own = known_frontier(model)
    try:
        if own is not None:
            check_stored(own, stored)
    except PlaneNotResidentError:
        return None
    return own


def _check_in_place(model: nn.Module, registry: Registry) -> None:
    """Raise unless every layer has the name that its site says, since `load` finds it by that name."""
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


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    # torch has no isfinite for floats of 8 bits
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())


def _level_tiles(plan: PrecisionMap, name: str, stored_levels: Tensor) -> Tensor:
    """The levels of a weight in a map, in the shape of its stored levels."""
    levels = bytearray(tile_levels(plan.levels[name], stored_levels.numel()))
    return torch.frombuffer(levels, dtype=torch.uint8).view_as(stored_levels)


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are not on planes, including those that state_dict leaves out."""
    rest: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, PlaneWeight):
            continue
        own = {**module._parameters, **({} if isinstance(module, PlaneModule) else module._buffers)}
        rest.update({f"{prefix}.{name}".lstrip("."): t.detach() for name, t in own.items() if t is not None})
    # tensors that share memory are written separately, since safetensors refuses shared memory
    seen: dict[int, str] = {}
    for name, t in list(rest.items()):
        if t.numel() and seen.setdefault(t.untyped_storage().data_ptr(), name) != name:
            rest[name] = t.clone()
    return rest


def _for_transformers(companions: Mapping[str, bytes], rest: str, registry: Registry) -> Mapping[str, bytes]:
    """The files beside a model; `config.json` tells transformers who loads it, and which file holds the rest."""
    if _CONFIG not in companions:
        return companions
    told = {**json.loads(companions[_CONFIG]), "quantization_config": {"quant_method": QUANT_METHOD, "rest": rest}}
    if told.get("dtype") is None:  # else transformers would open that file to find one
        told["dtype"] = str(next(iter(registry.weights.values())).dtype).removeprefix("torch.")
    return {**companions, _CONFIG: json.dumps(told, indent=2).encode()}


def _about(model: nn.Module) -> tuple[dict[str, Any], dict[str, bytes]]:
    """How to rebuild the model, for the head, and the files to write beside it."""
    inner = sentence_transformer.transformer_in(model)
    if inner is not None:
        about, files = _about(inner)
        described = sentence_transformer.description(model)
        return {**about, "sentence_transformer": described}, {**files, **sentence_transformer.tokenizer_files(model)}
    if not type(model).__module__.startswith("transformers.") or parts_of_adapters(model):
        return {}, {}
    config = cast(Any, model).config
    named = copy(config)
    named.architectures = [type(model).__name__]  # as save_pretrained does; a model made from a configuration has none
    for key in ("quantization_config", "transformers_weights"):  # of the folder that the model came from
        named.__dict__.pop(key, None)
    texts = {"config": named.to_json_string(use_diff=False)}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        texts["generation_config"] = generation.to_json_string()
    files = {f"{what}.json": text.encode() for what, text in texts.items()}
    source = Path(getattr(config, "_name_or_path", "") or "")
    if source.name and source.is_dir():
        for pattern in _COMPANIONS:
            files.update({f.name: f.read_bytes() for f in source.glob(pattern) if f.is_file()})
    # load reads the copies in the head, which is replaced in one step; the files are for other programs
    return {"transformers": type(model).__name__, **{what: json.loads(text) for what, text in texts.items()}}, files
