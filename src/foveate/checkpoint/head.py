"""The head of a checkpoint, `foveate.json`: sites, default map, and each tensor's file and checksum.

A head may come from a stranger. Every value of it is checked before anything relies on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveate.checkpoint.runs import FEATURE, RunTable
from foveate.errors import CheckpointError, SiteError
from foveate.files import parse_json, read_regular
from foveate.formats.grids import EXPONENTS
from foveate.formats.levels import PLANES, REACHES, WEIGHT_LEVELS
from foveate.formats.packing import GROUPS
from foveate.precision.maps import PrecisionMap, Site

VERSION = 2
HEAD = "foveate.json"
#: The part that holds exact tiles, and the feature that a head with it lists.
EXACT_PART, EXACT_FEATURE = "exact", "exact_tiles"
#: A head that lists a feature unknown here is refused. A head lists only the features that it uses.
FEATURES: frozenset[str] = frozenset({FEATURE, EXACT_FEATURE})
#: The dtypes that weights can have had before they were quantized.
DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})
#: The most bytes that a head may have: a few for each tile of the largest models.
LARGEST_HEAD = 1 << 28
_MOST_TILES = 1 << 28  # of all sites: 0.5e12 weights, and 0.25 GiB of levels
_LARGEST = 1 << 40  # rows or columns: far more than models have, and far less than 64 bits hold
DATA_FILE = re.compile(r"foveate-[a-z0-9]+-[0-9a-f]{12}\.safetensors")
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Head:
    """The head of a checkpoint.

    Attributes:
        sites: every site of the model.
        plan: the default map.
        other_bytes: bytes of everything that is not a site.
        reach, exponent, dtype: for each weight site, the reach of its planes, the exponent of its scales, and the name
            of the dtype it was quantized from.
        files: for each part (`scales`, `plane0` ... `plane4`, `exact`, `rest`, `profile`, `frontier`) its file name.
        checksums: for each part, the SHA-256 of each tensor in it.
        model: how to rebuild the model: for one of transformers its class name and configuration, else empty.
        profile: samples, objective and notes of the profile; None if the folder has no profile.
        written_by: the version of foveate.
        sha256: the checksum of the head itself; empty if it was not read from a file.
        other_parameters: as of `PrecisionMap`; None in folders of foveate 0.1.
        frontier: the description of the frontier (`foveate.checkpoint.frontier`); None if the folder has none.
        runs: for each plane's part, the runs of each weight that has several (`foveate.checkpoint.runs`).
    """

    sites: tuple[Site, ...]
    plan: PrecisionMap
    other_bytes: int
    reach: Mapping[str, int]
    exponent: Mapping[str, int]
    dtype: Mapping[str, str]
    files: Mapping[str, str]
    checksums: Mapping[str, Mapping[str, str]]
    model: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    written_by: str = ""
    sha256: str = field(default="", compare=False)
    other_parameters: Mapping[str, int] | None = None
    frontier: Mapping[str, Any] | None = None
    runs: Mapping[str, Mapping[str, RunTable]] = field(default_factory=dict)

    def of_weights(self) -> dict[str, Mapping[str, Any]]:
        """The tables that only weight sites have, by their keys in the file."""
        return {"reach": self.reach, "exponent": self.exponent, "dtype": self.dtype}

    def weight_sites(self) -> list[Site]:
        """The sites that hold weights."""
        return [s for s in self.sites if s.kind == "weight"]


def encoded(head: Head) -> bytes:
    """The head as the text that `read_head` reads."""
    data = {
        "format": "foveate",
        "version": VERSION,
        "features": [
            *([FEATURE] if any(head.runs.values()) else []),
            *([EXACT_FEATURE] if EXACT_PART in head.files else []),
        ],
        "written_by": head.written_by,
        "model": dict(head.model),
        "other_bytes": head.other_bytes,
        "other_parameters": None if head.other_parameters is None else dict(head.other_parameters),
        "sites": [
            {**asdict(s), **({key: of[s.name] for key, of in head.of_weights().items()} if s.kind == "weight" else {})}
            for s in head.sites
        ],
        "map": head.plan.to_json(),
        "profile": head.profile,
        **({} if head.frontier is None else {"frontier": dict(head.frontier)}),
        "files": {part: _file_entry(head, part) for part in head.files},
    }
    data = json.loads(json.dumps(data))
    return json.dumps({**data, "sha256": head_checksum(data)}, indent=1).encode()


def _file_entry(head: Head, part: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"file": head.files[part], "sha256": head.checksums[part]}
    runs = head.runs.get(part)
    return entry | ({"runs": {name: table.to_json() for name, table in runs.items()}} if runs else {})


def head_checksum(data: Mapping[str, Any]) -> str:
    """The SHA-256 of a head without its own entry `sha256`."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_head(path: PathLike) -> Head:
    """Read and check the head of a checkpoint.

    Raises:
        CheckpointError: no such folder, no head in it, a newer version, or a malformed head.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    file = folder / HEAD
    try:
        data = parse_json(read_regular(file, LARGEST_HEAD))
        version, features = data["version"], set(map(str, data["features"]))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no {HEAD}: it is not a foveate checkpoint, or saving it was interrupted"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is malformed: {error!r}") from error
    if data.get("format") != "foveate" or type(version) is not int or version < 1:
        raise CheckpointError(f"{file} is malformed: it does not name the format and its version")
    if version > VERSION:
        raise CheckpointError(
            f"{folder} is of format version {version}, newer than this foveate reads ({VERSION}): upgrade foveate"
        )
    if version < VERSION:
        raise CheckpointError(
            f"{folder} is of format version {version}, older than this foveate reads ({VERSION}): "
            "quantize the original again"
        )
    if data.get("sha256") != head_checksum(data):
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


def _names_and_hashes(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("the checksums of a file are not listed by name")
    return found


def _parse_head(data: Mapping[str, Any]) -> Head:
    sites = []
    reach: dict[str, int] = {}
    exponent: dict[str, int] = {}
    dtype: dict[str, str] = {}
    for entry in data["sites"]:
        entry = dict(entry)
        if entry["kind"] == "weight":
            of_weights: dict[str, dict[str, Any]] = {"reach": reach, "exponent": exponent, "dtype": dtype}
            for key, of in of_weights.items():
                of[entry["name"]] = entry.pop(key)
        site = Site(**{**entry, "aliases": tuple(entry["aliases"])})
        _check_site(site)
        sites.append(site)
    names = [name for s in sites for name in (s.name, *s.aliases)]
    if len(set(names)) != len(names):
        raise ValueError("a site is listed twice")
    if sum(s.tiles for s in sites) > _MOST_TILES:
        raise ValueError("the sites have more tiles than any model")
    if not all(type(r) is int and r in REACHES for r in reach.values()) or not set(dtype.values()) <= DTYPES:
        raise ValueError("a reach or a dtype does not exist")
    if not all(type(e) is int and e in EXPONENTS for e in exponent.values()):
        raise ValueError("an exponent of scales does not exist")
    files = {part: entry["file"] for part, entry in data["files"].items()}
    for name in files.values():
        if not DATA_FILE.fullmatch(name):
            raise ValueError(f"file name {name!r} is not one that foveate writes")
    needed = {"scales", "rest", *(f"plane{p}" for p in range(PLANES))}
    if not needed <= set(files):
        raise ValueError(f"files are not listed: {', '.join(sorted(needed - set(files)))}")
    if (EXACT_PART in files) != (EXACT_FEATURE in data["features"]):
        raise ValueError("exact tiles are listed without their feature, or the other way round")
    other_parameters = _counts(data.get("other_parameters"))
    head = Head(
        sites=tuple(sites),
        plan=PrecisionMap.from_json(data["map"], sites, data["other_bytes"], other_parameters),
        other_bytes=data["other_bytes"],
        reach=reach,
        exponent=exponent,
        dtype=dtype,
        files=files,
        checksums={part: _names_and_hashes(entry["sha256"]) for part, entry in data["files"].items()},
        model=dict(data["model"]),
        profile=None if data["profile"] is None else dict(data["profile"]),
        written_by=str(data["written_by"]),
        sha256=data["sha256"],
        other_parameters=other_parameters,
        frontier=None if data.get("frontier") is None else dict(data["frontier"]),
        runs={part: _runs(entry) for part, entry in data["files"].items()} if FEATURE in data["features"] else {},
    )
    if type(head.other_bytes) is not int or head.other_bytes < 0:
        raise ValueError(f"other_bytes (={head.other_bytes!r}) is not a number of bytes")
    if head.profile is not None:
        about = head.profile
        if type(about["samples"]) is not int or not isinstance(about["objective"], str):
            raise ValueError("the profile is not described")
        if not all(isinstance(note, str) for note in about["notes"]):
            raise ValueError("a note of the profile is no text")
        over = about.get("measured_over_summed", [1.0] * len(WEIGHT_LEVELS))
        if len(over) != len(WEIGHT_LEVELS) or not all(type(x) in (int, float) and 0 < x < _LARGEST for x in over):
            raise ValueError("measured_over_summed is not a positive number for each level")
    return head


def _runs(entry: Mapping[str, Any]) -> dict[str, RunTable]:
    found = {name: RunTable.from_json(table) for name, table in entry.get("runs", {}).items()}
    if not set(found) <= set(entry["sha256"]):
        raise ValueError("runs are listed of a weight that the file does not hold")
    return found


def _counts(found: Any) -> dict[str, int] | None:
    if found is not None and not (
        isinstance(found, dict) and all(type(n) is int and 0 <= n < _LARGEST for n in found.values())
    ):
        raise ValueError("other_parameters are not counted by the class of their module")
    return found


def _check_site(site: Site) -> None:
    texts = (site.name, *site.aliases)
    counts = (site.rows, site.columns, site.group, site.rows_read)
    if not all(isinstance(t, str) for t in texts) or not all(type(n) is int and 0 <= n < _LARGEST for n in counts):
        raise ValueError(f"site {site.name!r} is not described by texts and numbers")
    if site.kind not in ("weight", "input") or site.group not in GROUPS or type(site.row_gains) is not bool:
        raise ValueError(f"site {site.name!r} has a kind or group that does not exist")
