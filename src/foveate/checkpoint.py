"""The folder a quantized model is kept in. A kill while writing loses nothing; 4 bits read only what 4 bits need.

    foveate.json                         the head: version, sites, default map, every tensor's file and checksum
    foveate-scales-<hash>.safetensors    scales, gains, and the level each tile is stored for
    foveate-plane<p>-<hash>.safetensors  plane p of every weight (p = 0 the most significant)
    foveate-rest-<hash>.safetensors      everything that is not on planes
    foveate-profile-<hash>.safetensors   what was measured

The head is the commit point: data files have names made from their contents and are complete before the head that
names them replaces the old one; files that no head names are removed afterwards. Nothing is ever unpickled, and no name
in a head can point outside the folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foveate.errors import CheckpointError, FoveateError, PlaneNotResidentError, SiteError
from foveate.formats.levels import GAINED_LEVELS, NESTED_LEVELS, PLANES, REACHES, WEIGHT_LEVELS
from foveate.formats.packing import GROUPS, SCALE_VALUES, TILE_ROWS, tile_bytes, tile_starts
from foveate.maps import Levels, PrecisionMap, Profile, Site
from foveate.planes import PlaneTensor, arena, shared_tags

VERSION = 1
HEAD = "foveate.json"
#: Reserved for later versions: exact 16 and 32-bit tiles, zero masks, input permutations, importance tags. A head that
#: lists a feature unknown here is refused.
FEATURES: frozenset[str] = frozenset()
#: What weights can have been before they were quantized.
DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})
_LARGEST = 1 << 40  # rows or columns; far more, and far from what 64 bits cannot hold
_DATA_FILE = re.compile(r"foveate-[a-z0-9]+-[0-9a-f]{12}\.safetensors")
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Head:
    """The head of a checkpoint.

    Attributes:
        sites: every site of the model.
        plan: the default map.
        other_bytes: bytes of everything that is no site.
        reach, dtype: for each weight site, the reach of its planes and the name of the dtype it was quantized from.
        files: for each part (`scales`, `plane0` ... `plane4`, `rest`, `profile`) its file name.
        checksums: for each part, the SHA-256 of each tensor in it.
        model: how to rebuild the model: `{"transformers": class name}` or nothing.
        profile: samples, objective and notes of the profile; None if it was not kept.
        written_by: the version of foveate.
    """

    sites: tuple[Site, ...]
    plan: PrecisionMap
    other_bytes: int
    reach: Mapping[str, int]
    dtype: Mapping[str, str]
    files: Mapping[str, str]
    checksums: Mapping[str, Mapping[str, str]]
    model: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    written_by: str = ""

    def weight_sites(self) -> list[Site]:
        """The sites that hold weights."""
        return [s for s in self.sites if s.kind == "weight"]


# ----------------------------------------------------------------------------------------------------------------
# writing


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
    written_by: str,
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
        about = {"samples": profile.samples, "objective": profile.objective, "notes": list(profile.notes)}
        parts["profile"] = {f"{name}|losses": t for name, t in profile.losses.items()}
        parts["profile"].update(
            {f"{name}|{key}": t for name, kept in profile.statistics.items() for key, t in kept.items()}
        )
    with _folder(folder) as made:
        files, checksums = {}, {}
        for part, tensors in parts.items():
            checksums[part] = {name: _checksum(t) for name, t in tensors.items()}
            digest = hashlib.sha256(json.dumps(checksums[part], sort_keys=True).encode()).hexdigest()[:12]
            files[part] = f"foveate-{part}-{digest}.safetensors"
            _write_tensors(folder / files[part], tensors, made)
        for name, content in extra_files.items():
            _write_bytes(folder / name, content, made)
        head = Head(
            sites=plan.sites,
            plan=plan,
            other_bytes=plan.other_bytes,
            reach={name: w.reach for name, w in weights.items()},
            dtype=dtypes,
            files=files,
            checksums=checksums,
            model=model,
            profile=about,
            written_by=written_by,
        )
        _write_head(folder, head, made)
    for old in folder.iterdir():
        if old.name.startswith(".foveate-") and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        elif _DATA_FILE.fullmatch(old.name) and old.name not in files.values():
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
    with _folder(folder) as made:
        _write_head(folder, Head(**{**_fields(head), "plan": plan}), made)


def _fields(head: Head) -> dict[str, Any]:
    return {name: getattr(head, name) for name in Head.__dataclass_fields__}


def _write_head(folder: Path, head: Head, made: list[Path]) -> None:
    data = {
        "format": "foveate",
        "version": VERSION,
        "features": [],
        "written_by": head.written_by,
        "model": dict(head.model),
        "other_bytes": head.other_bytes,
        "sites": [
            {**asdict(s), **({"reach": head.reach[s.name], "dtype": head.dtype[s.name]} if s.kind == "weight" else {})}
            for s in head.sites
        ],
        "map": head.plan.to_json(),
        "profile": head.profile,
        "files": {part: {"file": name, "sha256": head.checksums[part]} for part, name in head.files.items()},
    }
    data = json.loads(json.dumps(data))
    _write_bytes(folder / HEAD, json.dumps({**data, "sha256": _head_checksum(data)}, indent=1).encode(), made)


def _head_checksum(data: Mapping[str, Any]) -> str:
    """The SHA-256 of a head, less its own entry `sha256`."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def _folder(folder: Path) -> Iterator[list[Path]]:
    """A folder to write into; what was newly made in it is removed again if writing fails."""
    existed = folder.exists()
    made: list[Path] = []
    try:
        _staging(folder).mkdir(parents=True, exist_ok=True)
        yield made
    except (OSError, SafetensorError) as error:
        for file in made:
            file.unlink(missing_ok=True)
        shutil.rmtree(_staging(folder), ignore_errors=True)
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, FoveateError):
            raise
        raise CheckpointError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(_staging(folder), ignore_errors=True)


def _staging(folder: Path) -> Path:
    """Where files are written before they get their names; safetensors puts temporary files of its own beside them."""
    return folder / f".foveate-{os.getpid()}"


def _write_tensors(target: Path, tensors: Mapping[str, Tensor], made: list[Path]) -> None:
    temporary = _staging(target.parent) / target.name
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
    _name(temporary, target, made)


def _write_bytes(target: Path, content: bytes, made: list[Path]) -> None:
    temporary = _staging(target.parent) / target.name
    temporary.write_bytes(content)
    _name(temporary, target, made)


def _name(temporary: Path, target: Path, made: list[Path]) -> None:
    new = not target.exists()
    _commit(temporary, target)
    if new:
        made.append(target)


def _commit(temporary: Path, target: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _checksum(tensor: Tensor) -> str:
    whole = tensor.contiguous()  # kept alive while its bytes are read
    return hashlib.sha256(_bytes_of(whole)).hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """A buffer over a contiguous tensor's bytes, which must outlive it."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


# ----------------------------------------------------------------------------------------------------------------
# reading


def read_head(path: PathLike) -> Head:
    """Read and check the head of a checkpoint.

    Raises:
        CheckpointError: no such folder, no head in it, a newer version, or a malformed head.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    file = folder / HEAD
    if not file.exists():
        raise CheckpointError(f"{folder} holds no {HEAD}: it is not a foveate checkpoint, or saving it was interrupted")
    try:
        data = json.loads(file.read_bytes())
        version, features = data["version"], set(map(str, data["features"]))
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file} is malformed: {error!r}") from error
    if data.get("format") != "foveate" or type(version) is not int or version < 1:
        raise CheckpointError(f"{file} is malformed: it does not name the format and its version")
    if version > VERSION:
        raise CheckpointError(
            f"{folder} is of format version {version}, newer than this foveate reads ({VERSION}): upgrade foveate"
        )
    if data.get("sha256") != _head_checksum(data):
        raise CheckpointError(f"{file} is damaged: its checksum does not match")
    unknown = features - FEATURES
    if unknown:
        raise CheckpointError(
            f"{folder} needs features that this foveate does not have: {', '.join(sorted(unknown))}: upgrade foveate"
        )
    try:
        return _parse_head(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SiteError) as error:
        raise CheckpointError(f"{file} is malformed: {error}") from error


def _parse_head(data: Mapping[str, Any]) -> Head:
    sites, reach, dtype = [], {}, {}
    for entry in data["sites"]:
        entry = dict(entry)
        if entry["kind"] == "weight":
            reach[entry["name"]], dtype[entry["name"]] = entry.pop("reach"), entry.pop("dtype")
        site = Site(**{**entry, "aliases": tuple(entry["aliases"])})
        _check_site(site)
        sites.append(site)
    names = [name for s in sites for name in (s.name, *s.aliases)]
    if len(set(names)) != len(names):
        raise ValueError("a site is listed twice")
    if not all(type(r) is int and r in REACHES for r in reach.values()) or not set(dtype.values()) <= DTYPES:
        raise ValueError("a reach or a dtype does not exist")
    files = {part: entry["file"] for part, entry in data["files"].items()}
    for name in files.values():
        if not _DATA_FILE.fullmatch(name):
            raise ValueError(f"file name {name!r} is not one that foveate writes")
    needed = {"scales", "rest", *(f"plane{p}" for p in range(PLANES))}
    if not needed <= set(files):
        raise ValueError(f"files are not listed: {', '.join(sorted(needed - set(files)))}")
    head = Head(
        sites=tuple(sites),
        plan=PrecisionMap.from_json(data["map"], sites, data["other_bytes"]),
        other_bytes=data["other_bytes"],
        reach=reach,
        dtype=dtype,
        files=files,
        checksums={part: dict(entry["sha256"]) for part, entry in data["files"].items()},
        model=dict(data["model"]),
        profile=None if data["profile"] is None else dict(data["profile"]),
        written_by=str(data["written_by"]),
    )
    if type(head.other_bytes) is not int or head.other_bytes < 0:
        raise ValueError(f"other_bytes (={head.other_bytes!r}) is not a number of bytes")
    if head.profile is not None:
        about = head.profile
        if type(about["samples"]) is not int or not isinstance(about["objective"], str):
            raise ValueError("the profile is not described")
        if not all(isinstance(note, str) for note in about["notes"]):
            raise ValueError("a note of the profile is no text")
    return head


def _check_site(site: Site) -> None:
    texts = (site.name, *site.aliases)
    counts = (site.rows, site.columns, site.group, site.rows_read)
    if not all(isinstance(t, str) for t in texts) or not all(type(n) is int and 0 <= n < _LARGEST for n in counts):
        raise ValueError(f"site {site.name!r} is not described by texts and numbers")
    if site.kind not in ("weight", "input") or site.group not in GROUPS or type(site.row_gains) is not bool:
        raise ValueError(f"site {site.name!r} has a kind or group that does not exist")


def _read_tensor(folder: Path, head: Head, part: str, name: str) -> Tensor:
    """One tensor, checked. Its memory is the file's: copy what is to be kept."""
    file = folder / head.files[part]
    try:
        # opened anew for each tensor: pages of a file count as memory for as long as it is mapped
        with safe_open(file, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if _checksum(tensor) != head.checksums[part].get(name):
        raise CheckpointError(f"{file} is damaged: the checksum of {name!r} does not match")
    return tensor


def _stored_levels(folder: Path, head: Head) -> dict[str, Tensor]:
    stored = {}
    for site in head.weight_sites():
        resident = _read_tensor(folder, head, "scales", f"{site.name}|resident").clone()
        valid = torch.tensor(WEIGHT_LEVELS, dtype=torch.uint8)
        if resident.dtype != torch.uint8 or resident.shape != site.grid or not bool(torch.isin(resident, valid).all()):
            raise CheckpointError(f"{folder}: the tile levels of {site.name} are malformed")
        stored[site.name] = resident
    return stored


def _wanted(site: Site, stored: Tensor, levels: Levels) -> Tensor:
    """The level to load each tile for; raises if it is not stored."""
    if isinstance(levels, int):
        wanted = torch.full_like(stored, levels)
    else:
        wanted = torch.frombuffer(bytearray(levels), dtype=torch.uint8).view_as(stored)
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
        tiles = bytes([level]) * stored.numel() if isinstance(level, int) else level
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
    wanted = {
        s.name: stored[s.name] if keep is None else _wanted(s, stored[s.name], keep.levels[s.name]) for s in sites
    }

    def block(part: str, suffix: str, floor: int, width: dict[int, int], dtype: torch.dtype) -> list[Tensor]:
        sizes = [int((wanted[s.name] >= floor).sum()) * width[s.group] for s in sites]
        targets = arena(sizes)
        for site, target in zip(sites, targets, strict=True):
            if not target.numel():
                continue
            tensor = _read_tensor(folder, head, part, site.name + suffix)
            have = (stored[site.name] >= floor).view(-1)
            if tensor.dtype != dtype or tensor.numel() * tensor.element_size() != int(have.sum()) * width[site.group]:
                raise CheckpointError(f"{folder}: {part} of {site.name} is malformed")
            need = (wanted[site.name] >= floor).view(-1)
            rows = tensor.view(torch.uint8).view(-1, width[site.group])
            target.copy_((rows if bool((need == have).all()) else rows[need[have]]).view(-1))
        return [t.view(dtype) for t in targets]

    scales = block("scales", "|scales", 1, dict.fromkeys(GROUPS, 2 * SCALE_VALUES), torch.float16)
    planes = [
        block(f"plane{p}", "", NESTED_LEVELS[p], {g: tile_bytes(p, g) for g in GROUPS}, torch.uint8)
        for p in range(PLANES)
    ]
    made = []
    for i, site in enumerate(sites):
        gain = _read_tensor(folder, head, "scales", f"{site.name}|gain").clone()
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
            )
        )
    return dict(zip((s.name for s in sites), shared_tags(made), strict=True))


def read_rest(path: PathLike, head: Head) -> dict[str, Tensor]:
    """Every tensor that is not on planes, copied into memory."""
    return {name: _read_tensor(Path(path), head, "rest", name).clone() for name in head.checksums["rest"]}


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
    for key in head.checksums["profile"]:
        name, _, what = key.rpartition("|")
        tensor = _read_tensor(folder, head, "profile", key).clone()
        if what == "losses":
            losses[name] = tensor
        else:
            statistics.setdefault(name, {})[what] = tensor
    for name, count in tiles.items():
        if name not in losses or losses[name].shape != (count, len(WEIGHT_LEVELS)):
            raise CheckpointError(f"{folder}: the profile does not fit its sites ({name})")
    about = head.profile
    return Profile(
        head.sites, losses, head.other_bytes, about["samples"], about["objective"], statistics, tuple(about["notes"])
    )
