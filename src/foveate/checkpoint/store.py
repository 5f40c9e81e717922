"""Planes, map and profile to files and back."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.checkpoint.files import Reader, checksum, write_bytes, write_tensors, writing
from foveate.checkpoint.head import DATA_FILE, HEAD, Head, PathLike, encoded, read_head
from foveate.errors import CheckpointError, PlaneNotResidentError, SiteError
from foveate.formats.levels import GAINED_LEVELS, INPUT_LEVELS, NESTED_LEVELS, PLANES, WEIGHT_LEVELS
from foveate.formats.packing import GROUPS, SCALE_BYTES, TILE_ROWS, tile_bytes, tile_starts
from foveate.maps import Levels, PrecisionMap, Profile, Site, tile_levels
from foveate.planes import PlaneTensor, arena, shared_tags
from foveate.version import __version__


def write(
    path: PathLike,
    *,
    weights: Mapping[str, PlaneTensor],
    dtypes: Mapping[str, str],
    rest: Mapping[str, Tensor],
    plan: PrecisionMap,
    profile: Profile | None,
    model: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
) -> None:
    """Write a checkpoint folder, or replace the one that is there; see `foveate.save`."""
    folder = Path(path)
    parts: dict[str, dict[str, Tensor]] = {"scales": {}, **{f"plane{p}": {} for p in range(PLANES)}, "rest": dict(rest)}
    for name, w in weights.items():
        parts["scales"].update({f"{name}|scales": w.scales, f"{name}|gain": w.gain, f"{name}|resident": w.resident})
        for p, plane in enumerate(w.planes):
            if plane.numel():
                parts[f"plane{p}"][name] = plane
    about: dict[str, Any] | None = None
    if profile is not None:
        about = {
            "samples": profile.samples,
            "objective": profile.objective,
            "notes": list(profile.notes),
            "measured_over_summed": list(profile.measured_over_summed),
        }
        parts["profile"] = {f"{name}|losses": t for name, t in profile.losses.items()}
        parts["profile"].update(
            {f"{name}|{key}": t for name, kept in profile.statistics.items() for key, t in kept.items()}
        )
    with writing(folder) as made:
        files, checksums = {}, {}
        for part, tensors in parts.items():
            checksums[part] = {name: checksum(t) for name, t in tensors.items()}
            digest = hashlib.sha256(json.dumps(checksums[part], sort_keys=True).encode()).hexdigest()[:12]
            files[part] = f"foveate-{part}-{digest}.safetensors"
            write_tensors(folder / files[part], tensors, made)
        for name, content in extra_files.items():
            write_bytes(folder / name, content, made)
        head = Head(
            sites=plan.sites,
            plan=plan,
            other_bytes=plan.other_bytes,
            reach={name: w.reach for name, w in weights.items()},
            exponent={name: w.exponent for name, w in weights.items()},
            dtype=dtypes,
            files=files,
            checksums=checksums,
            model=model,
            profile=about,
            written_by=f"foveate {__version__}",
        )
        write_bytes(folder / HEAD, encoded(head), made)
    for old in folder.iterdir():
        if old.name.startswith(".foveate-") and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        elif DATA_FILE.fullmatch(old.name) and old.name not in files.values():
            old.unlink(missing_ok=True)


def save_map(path: PathLike, plan: PrecisionMap) -> None:
    """Make `plan` the default map of a checkpoint. Only the head is rewritten.

    Raises:
        SiteError: the map is of another model.
        PlaneNotResidentError: the folder does not hold the planes of the map.
    """
    folder = Path(path)
    head = read_head(folder)
    if plan.sites != head.sites:
        raise SiteError(f"the map is of another model than {folder}")
    stored = _stored_levels(folder, head)
    for site in head.weight_sites():
        _wanted(site, stored[site.name], plan.levels[site.name])
    with writing(folder) as made:
        write_bytes(folder / HEAD, encoded(replace(head, plan=plan)), made)


def _reader(folder: Path, head: Head) -> Callable[[str, str], Tensor]:
    """What reads the tensor of a part (`scales`, `plane0`, ...) by its name."""
    files = Reader()
    return lambda part, name: files.tensor(folder / head.files[part], name, head.checksums[part].get(name))


def _stored_levels(folder: Path, head: Head) -> dict[str, Tensor]:
    stored = {}
    read = _reader(folder, head)
    for site in head.weight_sites():
        resident = read("scales", f"{site.name}|resident").clone()
        valid = torch.tensor(WEIGHT_LEVELS, dtype=torch.uint8)
        if resident.dtype != torch.uint8 or resident.shape != site.grid or not bool(torch.isin(resident, valid).all()):
            raise CheckpointError(f"{folder}: the tile levels of {site.name} are malformed")
        stored[site.name] = resident
    return stored


def _wanted(site: Site, stored: Tensor, levels: Levels) -> Tensor:
    """The level to load each tile for; raises if it is not stored."""
    wanted = torch.frombuffer(bytearray(tile_levels(levels, stored.numel())), dtype=torch.uint8).view_as(stored)
    if bool((wanted > stored).any()):
        missing = int(wanted[wanted > stored].max())
        kept = int(stored[wanted > stored].min())
        raise PlaneNotResidentError(
            f"{site.name} at level {missing}: the folder keeps some of its tiles up to {kept} bits only"
        )
    return wanted


def at_most_stored(path: PathLike, head: Head, plan: PrecisionMap) -> PrecisionMap:
    """The map, lowered wherever the folder does not store what it reads; the map itself where it stores everything."""
    levels: dict[str, Levels] = dict(plan.levels)
    for name, stored in _stored_levels(Path(path), head).items():
        level = levels[name]
        tiles = tile_levels(level, stored.numel())
        levels[name] = bytes(map(min, tiles, stored.flatten().tolist()))
    lowered = replace(plan, levels=levels, predicted_loss=float("nan"))
    return plan if lowered == plan else lowered


def read_planes(path: PathLike, head: Head, keep: PrecisionMap | None) -> dict[str, PlaneTensor]:
    """Read the weights, with the planes that a map needs or with all that are stored.

    Planes go straight into the blocks they stay in (`foveate.planes.arena`); of a plane that no tile needs, nothing is
    read.
    """
    folder = Path(path)
    sites = head.weight_sites()
    stored = _stored_levels(folder, head)
    read = _reader(folder, head)
    wanted = {
        s.name: stored[s.name] if keep is None else _wanted(s, stored[s.name], keep.levels[s.name]) for s in sites
    }

    def block(part: str, suffix: str, floor: int, width: dict[int, int], dtype: torch.dtype) -> list[Tensor]:
        sizes = [int((wanted[s.name] >= floor).sum()) * width[s.group] for s in sites]
        targets = arena(sizes)
        for site, target in zip(sites, targets, strict=True):
            if not target.numel():
                continue
            tensor = read(part, site.name + suffix)
            have = (stored[site.name] >= floor).view(-1)
            if tensor.dtype != dtype or tensor.numel() * tensor.element_size() != int(have.sum()) * width[site.group]:
                raise CheckpointError(f"{folder}: {part} of {site.name} is malformed")
            need = (wanted[site.name] >= floor).view(-1)
            rows = tensor.view(torch.uint8).view(-1, width[site.group])
            target.copy_((rows if bool((need == have).all()) else rows[need[have]]).view(-1))
        return [t.view(dtype) for t in targets]

    scales = block("scales", "|scales", 1, dict.fromkeys(GROUPS, SCALE_BYTES), torch.uint8)
    planes = [
        block(f"plane{p}", "", NESTED_LEVELS[p], {g: tile_bytes(p, g) for g in GROUPS}, torch.uint8)
        for p in range(PLANES)
    ]
    made = []
    for i, site in enumerate(sites):
        gain = read("scales", f"{site.name}|gain").clone()
        gain_rows = site.grid[0] * TILE_ROWS if site.row_gains else 1
        if gain.dtype != torch.float16 or gain.shape != (len(GAINED_LEVELS), gain_rows):
            raise CheckpointError(f"{folder}: the gains of {site.name} are malformed")
        resident, reach = wanted[site.name], head.reach[site.name]
        made.append(
            PlaneTensor(
                planes=tuple(planes[p][i] for p in range(PLANES)),
                scales=scales[i],
                gain=gain,
                resident=resident,
                starts=tile_starts(resident),
                tags=resident.expand(2, -1, -1).clone(),
                rows=site.rows,
                columns=site.columns,
                group=site.group,
                reach=reach,
                exponent=head.exponent[site.name],
            )
        )
    return dict(zip((s.name for s in sites), shared_tags(made), strict=True))


def read_rest(path: PathLike, head: Head) -> dict[str, Tensor]:
    """Every tensor that is not on planes, copied into memory."""
    read = _reader(Path(path), head)
    return {name: read("rest", name).clone() for name in head.checksums["rest"]}


#: Shapes of what is known of each input; see `Profile.statistics`.
INPUT_STATISTICS = {
    "mean": (1,),
    "variance": (1,),
    "entropy": (1,),
    "values": (1,),
    "batch_values": (1,),
    "range": (2,),
    "batch_moments": (2, 2),
}


def load_profile(path: PathLike) -> Profile:
    """Read what was measured of the model in a folder.

    Raises:
        CheckpointError: the folder is damaged, or holds no profile.
    """
    folder = Path(path)
    head = read_head(folder)
    if head.profile is None or "profile" not in head.files:
        raise CheckpointError(f"{folder} holds no profile")
    losses: dict[str, Tensor] = {}
    statistics: dict[str, dict[str, Tensor]] = {}
    tiles = {s.name: s.tiles for s in head.weight_sites()}
    read = _reader(folder, head)
    for key in head.checksums["profile"]:
        name, _, what = key.rpartition("|")
        tensor = read("profile", key).clone()
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{folder}: {key!r} of the profile is {tensor.dtype}, not torch.float32")
        if what == "losses":
            losses[name] = tensor
        else:
            statistics.setdefault(name, {})[what] = tensor
    shapes = {s.name: (1, len(INPUT_LEVELS)) for s in head.sites if s.kind == "input" and s.name in losses}
    shapes.update({name: (count, len(WEIGHT_LEVELS)) for name, count in tiles.items()})
    for name, shape in shapes.items():
        if name not in losses or losses[name].shape != shape or not bool(losses[name].isfinite().all()):
            raise CheckpointError(f"{folder}: the profile does not fit its sites ({name})")
    for name in (s.name for s in head.sites if s.kind == "input"):
        for what, tensor in statistics.get(name, {}).items():
            if tensor.shape != INPUT_STATISTICS.get(what, tensor.shape):
                raise CheckpointError(f"{folder}: {what} of {name} has shape {tuple(tensor.shape)}")
    about = head.profile
    return Profile(
        head.sites,
        losses,
        head.other_bytes,
        about["samples"],
        about["objective"],
        statistics,
        tuple(about["notes"]),
        tuple(map(float, about.get("measured_over_summed", [1.0] * len(WEIGHT_LEVELS)))),  # older ones have none
    )
