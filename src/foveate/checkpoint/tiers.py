"""Opening a folder whose planes stay on disk until there is memory for them.

What every level needs is read at once: scales, gains, stored levels. Planes get addresses and are read later, run by
run (`foveate.memory.reservation`). So a weight's planes have gaps: between two runs, for each has whole pages, and
where a run is not in memory. Its tile offsets say where each strip lies, and its stored levels say what can be read: at
first nothing.

Shapes: NT strips, G groups, T tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.checkpoint.exact import read_exact
from foveate.checkpoint.folder import Folder
from foveate.checkpoint.profile import read_profile
from foveate.checkpoint.runs import StoredWeight, importance_of, plane_pieces, runs_of, strip_bytes
from foveate.checkpoint.store import PlaneReader, stored_levels_in
from foveate.errors import CheckpointError, PlaneNotResidentError
from foveate.files import bytes_of
from foveate.formats.levels import NESTED_LEVELS, PLANES, TOP_LEVEL
from foveate.formats.packing import SCALE_BYTES, tile_bytes, tile_offsets_of
from foveate.memory.held import Held
from foveate.memory.places import FilePlace
from foveate.memory.reservation import Layout, Reservation, lay_out
from foveate.memory.runs import Run
from foveate.planes import PlaneTensor, rounded_up, share_active_levels, shortfall
from foveate.precision.maps import Site
from foveate.precision.profiles import Profile


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiers:
    """A folder whose planes are on disk and, as far as there is room, in memory.

    Attributes:
        weights: each weight. Its stored levels are what can be read now, which is nothing at first.
        stored: the levels that the folder stores, uint8 [NT, G].
        held: the runs and their places.
        importance: the loss that each run saves.
        row_frequency: for embeddings, the share of look-ups that read each strip in calibration, float32 [NT].
    """

    weights: dict[str, PlaneTensor]
    stored: dict[str, Tensor]
    held: Held
    importance: tuple[float, ...]
    row_frequency: dict[str, Tensor]


def read_tiers(folder: Folder) -> Tiers:
    """Open a folder; no plane is read.

    Raises:
        CheckpointError: the folder is damaged.
        FoveateError: planes cannot stay on disk on this system.
    """
    head = folder.head
    sites = head.weight_sites()
    stored = stored_levels_in(folder)
    reader = PlaneReader(folder=folder, stored=stored, wanted=stored)
    scales = reader.scales()
    runs = [run for site in sites for p in range(PLANES) for run in _runs(folder, site, p, stored[site.name])]
    units = {(run.weight, run.plane): tile_bytes(run.plane, _group(sites, run.weight)) for run in runs}
    layout = lay_out(runs, units)
    reservation = Reservation(layout.total, layout.always)
    places = {
        p: FilePlace(str(folder.path / head.files[f"plane{p}"]), folder.part(f"plane{p}").descriptor)
        for p in sorted({run.plane for run in runs})
    }
    weights = []
    for site, of_site in zip(sites, scales, strict=True):
        nothing = torch.zeros(site.grid, dtype=torch.uint8)
        weights.append(
            PlaneTensor(
                planes=tuple(_plane(layout, reservation, site, p) for p in range(PLANES)),
                scales=of_site,
                gain=reader.gain(site),
                stored_levels=nothing,
                tile_offsets=_tile_offsets(layout, site, stored[site.name]),
                active_levels=nothing[None].clone(),
                rows=site.rows,
                columns=site.columns,
                group=site.group,
                reach=head.reach[site.name],
                exponent=head.exponent[site.name],
                exact=read_exact(folder, site),  # always in memory
            )
        )
    fixed = sum(
        w.scales.numel() + s.resident_overhead() + (0 if w.exact is None else w.exact.nbytes())
        for w, s in zip(weights, sites, strict=True)
    )
    held = Held(
        runs=tuple(runs),
        layout=layout,
        reservation=reservation,
        places=places,
        strips={s.name: s.grid[0] for s in sites},
        fixed=head.other_bytes + fixed,
    )
    profile = read_profile(folder) if head.profile is not None else None
    statistics = {} if profile is None else profile.statistics
    return Tiers(
        weights=dict(zip((s.name for s in sites), share_active_levels(weights), strict=True)),
        stored=stored,
        held=held,
        importance=tuple(_importance(runs, stored, profile)),
        row_frequency={n: k["row_frequency"] for n, k in statistics.items() if "row_frequency" in k},
    )


def _group(sites: list[Site], name: str) -> int:
    return next(s.group for s in sites if s.name == name)


def _runs(folder: Folder, site: Site, plane: int, stored_levels: Tensor) -> list[Run]:
    head, part = folder.head, f"plane{plane}"
    size = sum(strip_bytes(stored_levels, plane, site.group))
    if not size:
        return []
    entry, sha256 = folder.part(part).entries.get(site.name), head.checksums[part].get(site.name)
    if entry is None or sha256 is None or entry.size != size or entry.dtype != torch.uint8:
        raise CheckpointError(f"{folder.path}: {part} of {site.name} is malformed")
    return runs_of(site, plane, stored_levels, sha256, entry.begin, head.runs.get(part, {}).get(site.name))


def _plane(layout: Layout, reservation: Reservation, site: Site, plane: int) -> Tensor:
    key = (site.name, plane)
    if key not in layout.begins:
        return torch.empty(0, dtype=torch.uint8)
    return reservation.tensor(layout.begins[key], layout.ends[key])


def _tile_offsets(layout: Layout, site: Site, stored_levels: Tensor) -> Tensor:
    """Where each strip's tiles begin, int64 [NT, 6], with the gaps between runs."""
    offsets = tile_offsets_of(stored_levels)
    for plane in range(PLANES):
        starts = layout.starts.get((site.name, plane))
        if starts is None:
            continue
        unit = tile_bytes(plane, site.group)
        packed = offsets[:, 1 + plane].clone()
        firsts = sorted(starts)
        for first, last in zip(firsts, (*firsts[1:], len(packed)), strict=True):
            offsets[first:last, 1 + plane] = packed[first:last] - packed[first] + starts[first] // unit
    return offsets


def _importance(runs: list[Run], stored: dict[str, Tensor], profile: Profile | None) -> list[float]:
    """The loss that each run saves: as measured, or else as rounding to a grid has it, a quarter for each bit."""
    by_strip: dict[tuple[str, int], Tensor] = {}
    found = []
    for run in runs:
        losses = None if profile is None else profile.scaled_losses(run.weight)
        key = (run.weight, run.plane)
        if losses is not None and key not in by_strip:
            each = importance_of(losses, stored[run.weight], run.plane)
            by_strip[key] = torch.tensor(each, dtype=torch.float64)
        if key in by_strip:
            found.append(float(by_strip[key][run.first : run.last].sum()))
        elif math.isfinite(run.tag.importance):
            found.append(max(run.tag.importance, 0.0))
        else:
            found.append(run.size * 4.0**-run.tag.level)
    return found


def stored_weight(tiers: Tiers, name: str, levels: Tensor | None = None) -> StoredWeight:
    """A weight as its folder stores it, to be written to another folder. Its planes are read from disk, run by run.

    Args:
        tiers: the open folder.
        name: the site of the weight.
        levels: store each tile only up to this level, uint8 [NT, G]; all that is stored if not given.

    Raises:
        PlaneNotResidentError: a level is above the stored one.
    """
    have, weight = tiers.stored[name], tiers.weights[name]
    kept, exact = have, weight.exact
    if levels is not None:
        if shortfall(levels, have, None if exact is None else exact.levels()) is not None:
            raise PlaneNotResidentError(f"{name}: a tile cannot be kept at a level above the one it is stored for")
        kept = levels if exact is None else rounded_up(levels, have, exact.levels())
        as_exact = kept > TOP_LEVEL
        exact = None if exact is None else exact.chosen(as_exact)
        kept = torch.where(as_exact, 0, kept)
    planes = []
    for plane in range(PLANES):
        size = sum(strip_bytes(kept, plane, weight.group))
        planes.append(plane_pieces(size, partial(_pieces, tiers, name, plane, kept)))
    return StoredWeight(
        planes=tuple(planes),
        scales=weight.scales.view(-1, SCALE_BYTES)[(kept > 0)[have > 0]].reshape(-1),
        gain=weight.gain,
        stored_levels=kept,
        group=weight.group,
        reach=weight.reach,
        exponent=weight.exponent,
        exact=exact,
    )


def _pieces(tiers: Tiers, name: str, plane: int, kept: Tensor) -> Iterator[Any]:
    """The bytes of a plane, read run by run; of each the tiles whose kept level has the plane."""
    have, least = tiers.stored[name], NESTED_LEVELS[plane]
    unit = tile_bytes(plane, tiers.weights[name].group)
    for number, run in enumerate(tiers.held.runs):
        if (run.weight, run.plane) != (name, plane):
            continue
        strips = slice(run.first, run.last)
        needed = (kept[strips] >= least)[have[strips] >= least]
        if not bool(needed.any()):
            continue
        whole = tiers.held.read_once(number)
        if bool(needed.all()):
            yield whole
        else:
            tiles = torch.frombuffer(whole, dtype=torch.uint8).view(-1, unit)[needed].contiguous()
            yield bytes_of(tiles)
