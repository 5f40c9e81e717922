"""Reading what was measured of a model from a checkpoint folder: the profile, at once or when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.checkpoint.folder import Folder, later, opened
from foveate.checkpoint.head import Head, PathLike
from foveate.errors import BudgetError, CheckpointError
from foveate.formats.levels import EXACT_LEVELS, INPUT_LEVELS, WEIGHT_LEVELS
from foveate.precision.maps import Site
from foveate.precision.profiles import EXACT, FITTED, Profile
from foveate.precision.timings import Timings

#: The shapes of the statistics of each input; see `Profile.statistics`.
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
    with opened(path) as folder:
        return read_profile(folder)


def profile_later(folder: Folder) -> Callable[[], Profile]:
    """A function that reads the profile of a folder when it is called (`foveate.checkpoint.folder.later`)."""
    return later(folder, _about, read_profile, "what was measured of it")


def _about(head: Head) -> list[Any]:
    """What a head says of its profile: equal for two heads if their profiles are the same."""
    return [[asdict(s) for s in head.sites], head.other_bytes, head.profile, head.checksums.get("profile")]


def read_profile(folder: Folder) -> Profile:
    """Read the profile of an open folder; errors as for `load_profile`."""
    head, path = folder.head, folder.path
    if head.profile is None or "profile" not in head.files:
        raise CheckpointError(f"{path} holds no profile")
    losses: dict[str, Tensor] = {}
    statistics: dict[str, dict[str, Tensor]] = {}
    tiles = {s.name: s.tiles for s in head.weight_sites()}
    # bytes of the losses, or of the longest statistic, which has a number for each strip or each group
    most = {s.name: 4 * max(s.tiles * len(WEIGHT_LEVELS), sum(s.grid), 16) for s in head.sites}
    for key in head.checksums["profile"]:
        name, _, what = key.rpartition("|")
        tensor = folder.read("profile", key, most.get(name, 0))
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: {key!r} of the profile is {tensor.dtype}, not torch.float32")
        if what == "losses":
            losses[name] = tensor
        else:
            statistics.setdefault(name, {})[what] = tensor
    shapes = {s.name: (1, len(INPUT_LEVELS)) for s in head.sites if s.kind == "input" and s.name in losses}
    shapes.update({name: (count, len(WEIGHT_LEVELS)) for name, count in tiles.items()})
    for name, shape in shapes.items():
        if name not in losses or losses[name].shape != shape or not bool(losses[name].isfinite().all()):
            raise CheckpointError(f"{path}: the profile does not fit its sites ({name})")
    for site in head.sites:
        for what, tensor in statistics.get(site.name, {}).items():
            _check_statistic(path, site, what, tensor)
    about = head.profile
    return Profile(
        head.sites,
        losses,
        head.other_bytes,
        about["samples"],
        about["objective"],
        statistics,
        tuple(about["notes"]),
        tuple(map(float, about.get("measured_over_summed", [1.0] * len(WEIGHT_LEVELS)))),  # not in older folders
        head.other_parameters,
        _timings(path, about.get("timings")),
    )


def _timings(path: Path, found: Any) -> Timings | None:
    try:
        return None if found is None else Timings.from_json(found)
    except BudgetError as error:
        raise CheckpointError(f"{path}: the timings of the profile are malformed: {error}") from error


def _check_statistic(path: Path, site: Site, what: str, tensor: Tensor) -> None:
    strips, groups = site.grid
    fitted = (len(WEIGHT_LEVELS),) if tensor.numel() > 1 else (1,)  # older folders have one number for all levels
    of_weights = {
        "input_energy": (groups,),
        "output_range": (2,),
        "row_frequency": (strips,),
        FITTED: fitted,
        EXACT: (site.tiles,),
    }
    if what == EXACT and not bool(torch.isin(tensor, torch.tensor([0.0, *EXACT_LEVELS])).all()):
        raise CheckpointError(f"{path}: {what} of {site.name} has a level that is not one of 0, 16, 32")
    shapes = INPUT_STATISTICS if site.kind == "input" else of_weights
    if tensor.shape != shapes.get(what, tensor.shape):
        raise CheckpointError(f"{path}: {what} of {site.name} has shape {tuple(tensor.shape)}")
    # an output that calibration never reached has the range from Inf to -Inf
    if what in shapes and what != "output_range" and not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{path}: {what} of {site.name} holds NaN or Inf")
