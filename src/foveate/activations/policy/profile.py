"""The sensitivity profile of a model in training: what each saved tensor's rounding does to the gradient, in a file.

    store.save_profile("model.saved.json")      fv.compress_activations(model, error=0.1, profile="model.saved.json")

With it a later run of the same model has no first steps to learn in. It is JSON: what errors are relative to (a file of
one metric is refused where another is asked for), for each site bytes, errors and what was measured locally, for each
family how much of a local error reaches the parameters, and how audits came out. It has its own SHA-256, and says how
the parameters of its model are shaped: one that was altered, or is of another model, is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.activations.forms.encodings import GROUPED_LEVELS
from foveate.activations.forms.rules import rule_of
from foveate.activations.measure.ledger import Ledger, Site, recent
from foveate.activations.policy.choose import LEVELS
from foveate.errors import CheckpointError
from foveate.files import parse_json, read_regular, replacing

_VERSION = 3
_LARGEST_FILE = 1 << 26
#: Beyond all bytes and errors of any model.
_LARGEST = 1e300


def save_profile(ledger: Ledger, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what a ledger knows of a model; the file is exchanged in one step.

    Raises:
        CheckpointError: the file cannot be written.
    """
    target = Path(path)
    sites = {site.name: _site_to_json(ledger, site) for site in ledger.stored_sites()}
    families = {
        name: [factor for factor in family.transfer if math.isfinite(factor)]
        for name, family in ledger.families.items()
        if family.transfer
    }
    content = {
        "foveate_saved_profile": _VERSION,
        "levels": list(LEVELS),
        "relative_to": ledger.relative_to.value,
        "parameters": _shapes_of(model),
        "sites": sites,
        "families": families,
        "audits": list(ledger.audits.log_ratios),
    }
    content = _finite(content)
    try:
        with replacing(target) as temporary:
            temporary.write_text(json.dumps({**content, "sha256": profile_checksum(content)}, indent=1), "utf-8")
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def profile_checksum(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a profile, less its own entry `sha256`."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _shapes_of(model: nn.Module) -> str:
    """What tells a model from others, whatever it is wrapped in: the shapes of its parameters."""
    shapes = sorted(list(p.shape) for p in model.parameters())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _site_to_json(ledger: Ledger, site: Site) -> dict[str, Any]:
    errors = list(ledger.errors(site))
    measured = any(map(math.isfinite, errors[:-1]))
    return {
        "bytes": list(site.bytes),
        "closed_form": site.closed,
        "errors": errors,
        "measured": None
        if site.read_by_second_backward and not measured
        else _mean(site.errors if site.closed else site.local),
        "statistics": site.statistics.summary().to_json(),
    }


def _mean(rows: Any) -> list[float] | None:
    mean = recent(rows) if rows else None
    return mean.tolist() if mean is not None and bool(mean.isfinite().all()) else None


def _finite(value: Any) -> Any:
    """The same with null in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_profile_into(ledger: Ledger, model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read a file that `save_profile` wrote into an empty ledger.

    Raises:
        CheckpointError: there is no such file, or it is not a profile of this version, or damaged, or of another model,
            or was measured relative to something else, or numbers make no sense.
    """
    try:
        content = parse_json(read_regular(Path(path), _LARGEST_FILE))
        if not isinstance(content, dict) or content.get("foveate_saved_profile") != _VERSION:
            raise CheckpointError(f"{path} is not a profile of saved tensors of version {_VERSION}")
        if content.get("sha256") != profile_checksum(content):
            raise CheckpointError(f"{path} is damaged: its checksum does not match")
        if content["parameters"] != _shapes_of(model):
            raise CheckpointError(f"{path} was measured of another model: its parameters have other shapes")
        found = content["relative_to"]
        if found != ledger.relative_to.value:
            raise CheckpointError(
                f"{path} was measured relative to {found!r}, and errors are asked for relative to "
                f"{ledger.relative_to.value!r}: give relative_to= as it was then, or measure anew"
            )
        for name, entry in content["sites"].items():
            _read_site(ledger, name, entry)
        for name, transfers in content["families"].items():
            family = ledger.families[name] = ledger.new_family()
            family.transfer.extend(_number(value) for value in transfers)
            family.probed_at = 0
        ledger.audits.log_ratios.extend(_number(value, signed=True) for value in content["audits"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a profile of saved tensors: {error!r}") from error


def _read_site(ledger: Ledger, name: str, entry: Mapping[str, Any]) -> None:
    function = name.rpartition(":")[2].split(".")[1]
    site = ledger.site(name, rule_of(function))
    site.closed = bool(entry["closed_form"])
    sizes = tuple(int(_number(value)) for value in entry["bytes"])
    if len(sizes) != len(LEVELS):
        raise ValueError(f"{name} has {len(sizes)} sizes")
    site.count(sizes, -1)
    if entry["measured"] is not None:
        (site.errors if site.closed else site.local).append(_levels(entry["measured"]))


def _levels(values: Any) -> Tensor:
    row = torch.tensor([_number(value) for value in values], dtype=torch.float64)
    if len(row) != len(GROUPED_LEVELS):
        raise ValueError(f"{len(row)} errors for {len(GROUPED_LEVELS)} levels")
    return row


def _number(value: Any, signed: bool = False) -> float:
    if type(value) not in (int, float) or not -_LARGEST < value < _LARGEST or (value < 0 and not signed):
        raise ValueError(f"{value!r} is not a number that a profile can hold")
    return float(value)
