"""Writing planes, map and profile to a checkpoint folder, and reading them back.

In the files the tensor of a weight's stored levels has the name `<site>|resident`. Loading can *keep* fewer planes than
the folder stores; then the stored levels of the loaded weights are lower than those of the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.checkpoint.exact import exact_levels_in, read_exact, tensors_of
from foveate.checkpoint.files import writing
from foveate.checkpoint.folder import Folder, opened
from foveate.checkpoint.frontier import check_stored, write_frontier
from foveate.checkpoint.head import EXACT_PART, HEAD, Head, PathLike, encoded, read_head
from foveate.checkpoint.runs import Cuts, StoredWeight, cuts_of
from foveate.errors import CheckpointError, PlaneNotResidentError, SiteError
from foveate.files import Pieces
from foveate.formats.levels import GAINED_LEVELS, NESTED_LEVELS, PLANES, TOP_LEVEL, WEIGHT_LEVELS
from foveate.formats.packing import GROUPS, SCALE_BYTES, TILE_ROWS, tile_bytes, tile_offsets_of
from foveate.memory.arena import arena
from foveate.planes import PlaneTensor, rounded_up, share_active_levels, shortfall
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import Levels, PrecisionMap, Site, tile_levels
from foveate.precision.profiles import Profile
from foveate.precision.timings import Timings
from foveate.version import __version__


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured of a model, as far as a folder holds it: the profile, and the frontier that was made of it."""

    profile: Profile | None = None
    frontier: Frontier | None = None


def write(
    path: PathLike,
    *,
    weights: Mapping[str, PlaneTensor | StoredWeight],
    dtypes: Mapping[str, str],
    rest: Mapping[str, Tensor],
    plan: PrecisionMap,
    measured: Measurements,
    model: Mapping[str, Any],
    extra_files: Callable[[Mapping[str, str]], Mapping[str, bytes]],
) -> None:
    """Write a checkpoint folder, or replace the one that is there; see `foveate.save`.

    `extra_files` is told the name of each part's file, and says what else to write.
    """
    folder, profile = Path(path), measured.profile
    parts: dict[str, dict[str, Tensor | Pieces]] = {
        "scales": {},
        **{f"plane{p}": {} for p in range(PLANES)},
        "rest": dict(rest),
    }
    cuts: dict[str, dict[str, Cuts]] = {f"plane{p}": {} for p in range(PLANES)}
    exact = {key: tensor for name, w in weights.items() for key, tensor in tensors_of(name, w.exact).items()}
    if exact:
        parts[EXACT_PART] = {**exact}
    for name, w in weights.items():
        parts["scales"].update(
            {f"{name}|scales": w.scales, f"{name}|gain": w.gain, f"{name}|resident": w.stored_levels}
        )
        losses = None if profile is None else profile.scaled_losses(name)
        planes: Sequence[Tensor | Pieces] = w.planes
        for p, plane in enumerate(planes):
            if plane.numel() if isinstance(plane, Tensor) else plane.size:
                parts[f"plane{p}"][name] = plane
                cuts[f"plane{p}"][name] = cuts_of(w.stored_levels, p, w.group, losses)
    about: dict[str, Any] | None = None
    if profile is not None:
        about = {
            "samples": profile.samples,
            "objective": profile.objective,
            "notes": list(profile.notes),
            "measured_over_summed": list(profile.measured_over_summed),
            **({} if profile.timings is None else {"timings": profile.timings.to_json()}),
        }
        parts["profile"] = {f"{name}|losses": t for name, t in profile.losses.items()}
        parts["profile"].update(
            {f"{name}|{key}": t for name, kept in profile.statistics.items() for key, t in kept.items()}
        )
    with writing(folder) as writer:
        written = {part: writer.tensors(part, tensors, cuts.get(part, {})) for part, tensors in parts.items()}
        files = {part: one.file for part, one in written.items()}
        for name, content in extra_files(files).items():
            writer.content(name, content)
        head = Head(
            sites=plan.sites,
            plan=plan,
            other_bytes=plan.other_bytes,
            other_parameters=plan.other_parameters,
            reach={name: w.reach for name, w in weights.items()},
            exponent={name: w.exponent for name, w in weights.items()},
            dtype=dtypes,
            files=files,
            checksums={part: one.checksums for part, one in written.items()},
            runs={part: one.runs for part, one in written.items()},
            model=model,
            profile=about,
            written_by=f"foveate {__version__}",
        )
        writer.content(HEAD, encoded(write_frontier(writer, head, measured.frontier)))


def save_map(path: PathLike, plan: PrecisionMap) -> None:
    """Make `plan` the default map of a checkpoint. Only the head is rewritten.

    Raises:
        SiteError: the map is of another model.
        PlaneNotResidentError: the folder does not hold the planes of the map.
    """
    read_head(path)  # nothing is made where no checkpoint is
    with writing(Path(path)) as writer, opened(path) as folder:
        if plan.sites != folder.head.sites:
            raise SiteError(f"the map is of another model than {path}")
        stored, exact = stored_levels_in(folder), exact_levels_in(folder)
        for site in folder.head.weight_sites():
            _wanted(site, stored[site.name], exact.get(site.name), plan.levels[site.name])
        writer.content(HEAD, encoded(replace(folder.head, plan=plan)))


def save_frontier(path: PathLike, frontier: Frontier | None) -> None:
    """Make `frontier` the frontier of a checkpoint, or leave it without one. The planes stay as they are.

        fv.save_frontier("out/", fv.frontier(fv.load_profile("out/"), 64))

    Raises:
        SiteError: the frontier is of another model.
        PlaneNotResidentError: the folder does not hold the planes of its best map.
        CheckpointError: the folder is missing or damaged, or cannot be written.
    """
    read_head(path)  # nothing is made where no checkpoint is
    with writing(Path(path)) as writer, opened(path) as folder:
        if frontier is not None:
            if frontier[0].sites != folder.head.sites:
                raise SiteError(f"the frontier is of another model than {path}")
            check_stored(frontier, highest_levels_in(folder))
        writer.content(HEAD, encoded(write_frontier(writer, folder.head, frontier)))


def save_timings(path: PathLike, timings: Timings | None) -> None:
    """Store times with the profile of a checkpoint, in place of earlier ones. Only the head is rewritten.

        fv.save_timings("out/", fv.measure_timings(fv.load("out/"), batch))

    Raises:
        CheckpointError: the folder is missing or damaged, cannot be written, or holds no profile.
        SiteError: a weight of the folder was not timed.
    """
    read_head(path)  # nothing is made where no checkpoint is
    with writing(Path(path)) as writer, opened(path) as folder:
        head = folder.head
        if head.profile is None:
            raise CheckpointError(f"{path} holds no profile to store times with")
        missing = {s.name for s in head.weight_sites()} - set(timings.products if timings else ())
        if timings is not None and missing:
            raise SiteError(f"the timings are of another model than {path}: {min(missing)} was not timed")
        about = {key: value for key, value in head.profile.items() if key != "timings"}
        about |= {} if timings is None else {"timings": timings.to_json()}
        writer.content(HEAD, encoded(replace(head, profile=about)))


def stored_levels_in(folder: Folder) -> dict[str, Tensor]:
    """For each weight site the stored level of each tile, uint8 [NT, G]."""
    stored = {}
    for site in folder.head.weight_sites():
        stored_levels = folder.read("scales", f"{site.name}|resident", site.tiles)
        valid = torch.tensor(WEIGHT_LEVELS, dtype=torch.uint8)
        if (
            stored_levels.dtype != torch.uint8
            or stored_levels.shape != site.grid
            or not bool(torch.isin(stored_levels, valid).all())
        ):
            raise CheckpointError(f"{folder.path}: the tile levels of {site.name} are malformed")
        stored[site.name] = stored_levels
    return stored


def highest_levels_in(folder: Folder) -> dict[str, Tensor]:
    """For each weight site the highest level at which each tile can be read, uint8 [NT, G]."""
    exact = exact_levels_in(folder)
    return {n: torch.maximum(have, exact[n]) if n in exact else have for n, have in stored_levels_in(folder).items()}


def _wanted(site: Site, stored: Tensor, exact: Tensor | None, levels: Levels) -> Tensor:
    """The level up to which each tile is to be loaded; raises `PlaneNotResidentError` if it is not stored."""
    wanted = torch.frombuffer(bytearray(tile_levels(levels, stored.numel())), dtype=torch.uint8).view_as(stored)
    short = shortfall(wanted, stored, exact)
    if short is not None:
        raise PlaneNotResidentError(
            f"{site.name} at level {short[0]}: the folder stores some of its tiles up to {short[1]} bits only"
        )
    return wanted if exact is None else rounded_up(wanted, stored, exact)


def at_most_stored(folder: Folder, plan: PrecisionMap) -> PrecisionMap:
    """The map, lowered wherever it reads planes that the folder does not store; the same map if there are none."""
    levels: dict[str, Levels] = dict(plan.levels)
    for name, stored in highest_levels_in(folder).items():
        level = levels[name]
        tiles = tile_levels(level, stored.numel())
        levels[name] = bytes(map(min, tiles, stored.flatten().tolist()))
    lowered = replace(plan, levels=levels, predicted_loss=float("nan"))
    return plan if lowered == plan else lowered


@dataclass(frozen=True, kw_only=True)
class PlaneReader:
    """Reads planes and scales of the weights of a folder into blocks of memory that they stay in.

    Attributes:
        folder: the folder.
        stored: the stored level of each tile of each weight, uint8 [NT, G].
        wanted: the level up to which each tile is read, at most the stored one.
    """

    folder: Folder
    stored: Mapping[str, Tensor]
    wanted: Mapping[str, Tensor]

    def block(self, part: str, suffix: str, least_level: int, width: Mapping[int, int]) -> list[Tensor]:
        """One part of every weight, of the tiles whose wanted level is at least `least_level`; `width` has the bytes of
        a tile for each size of groups.
        """
        sites = self.folder.head.weight_sites()
        sizes = [int((self.wanted[s.name] >= least_level).sum()) * width[s.group] for s in sites]
        targets = arena(sizes)
        for site, target in zip(sites, targets, strict=True):
            if not target.numel():
                continue
            have = (self.stored[site.name] >= least_level).view(-1)
            size = int(have.sum()) * width[site.group]
            tensor = self.folder.read(part, site.name + suffix, size)
            if tensor.dtype != torch.uint8 or tensor.numel() != size:
                raise CheckpointError(f"{self.folder.path}: {part} of {site.name} is malformed")
            need = (self.wanted[site.name] >= least_level).view(-1)
            rows = tensor.view(-1, width[site.group])
            target.copy_((rows if bool((need == have).all()) else rows[need[have]]).view(-1))
        return targets

    def scales(self) -> list[Tensor]:
        """The scales of each weight."""
        return self.block("scales", "|scales", 1, dict.fromkeys(GROUPS, SCALE_BYTES))

    def gain(self, site: Site) -> Tensor:
        """The gains of a weight."""
        path = self.folder.path
        gain_rows = site.grid[0] * TILE_ROWS if site.row_gains else 1
        gain = self.folder.read("scales", f"{site.name}|gain", 2 * len(GAINED_LEVELS) * gain_rows)
        if gain.dtype != torch.float16 or gain.shape != (len(GAINED_LEVELS), gain_rows):
            raise CheckpointError(f"{path}: the gains of {site.name} are malformed")
        if not bool(gain.isfinite().all()):
            raise CheckpointError(f"{path}: the gains of {site.name} hold NaN or Inf")
        return gain


def read_planes(folder: Folder, keep: PrecisionMap | None) -> dict[str, PlaneTensor]:
    """Read the weights, with the planes that the map `keep` reads, or with all that are stored if it is None.

    Planes are copied into the blocks that they stay in (`foveate.memory.arena`). A plane that no tile needs is not
    read.
    """
    head = folder.head
    sites = head.weight_sites()
    stored, exact = stored_levels_in(folder), exact_levels_in(folder)
    wanted, as_exact = dict(stored), {name: levels > 0 for name, levels in exact.items()}
    for site in sites if keep is not None else ():
        assert keep is not None
        levels = _wanted(site, stored[site.name], exact.get(site.name), keep.levels[site.name])
        as_exact[site.name] = levels > TOP_LEVEL
        wanted[site.name] = torch.where(as_exact[site.name], 0, levels)
    reader = PlaneReader(folder=folder, stored=stored, wanted=wanted)
    scales = reader.scales()
    planes = [
        reader.block(f"plane{p}", "", NESTED_LEVELS[p], {g: tile_bytes(p, g) for g in GROUPS}) for p in range(PLANES)
    ]
    made = [
        PlaneTensor(
            planes=tuple(planes[p][i] for p in range(PLANES)),
            scales=scales[i],
            gain=reader.gain(site),
            stored_levels=wanted[site.name],
            tile_offsets=tile_offsets_of(wanted[site.name]),
            active_levels=wanted[site.name][None].clone(),
            rows=site.rows,
            columns=site.columns,
            group=site.group,
            reach=head.reach[site.name],
            exponent=head.exponent[site.name],
            exact=read_exact(folder, site, as_exact.get(site.name)),
        )
        for i, site in enumerate(sites)
    ]
    return dict(zip((s.name for s in sites), share_active_levels(made), strict=True))
