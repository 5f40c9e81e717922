"""A frontier in a checkpoint folder: a table of one byte a tile and level, and what was measured, in the head.

The maps are nested, so a tile that is read at level b or more is read so at the first n maps and at none after. The
table holds these numbers n. It has the same size for 2 maps and for 255:

    weights  uint8 [L, T]  for each of L levels, and each tile of all weights in the order of the sites
    inputs   uint8 [I, S]  for each of I levels, and each input site

docs/format.md has the whole form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from foveate.checkpoint.files import Writer
from foveate.checkpoint.folder import Folder, later, opened
from foveate.checkpoint.head import Head, PathLike
from foveate.errors import CheckpointError, FoveateError, PlaneNotResidentError
from foveate.formats.levels import INPUT_LEVELS, TILE_LEVELS, WEIGHT_LEVELS
from foveate.precision.frontiers import MOST_MAPS, Frontier, Point
from foveate.precision.maps import Levels, PrecisionMap, Site

#: The part of a folder that holds the table.
PART = "frontier"
_ABOVE_ZERO = tuple(level for level in TILE_LEVELS if level)


def _levels_of(frontier: Frontier) -> tuple[int, ...]:
    """The levels of the rows of a table: those of planes, and the exact ones that the best map has."""
    best = set(frontier.encoded(0).weights)
    return tuple(level for level in _ABOVE_ZERO if level in WEIGHT_LEVELS or level in best)


def table_of(frontier: Frontier) -> dict[str, Tensor]:
    """The table of a frontier: for each level and tile, and each level and input, how many maps read it so or better.

    Returns:
        `weights` uint8 [L, T] with a row for each of the levels 2, 3, 4, 6 and 8, and 16 or 32 if in use; `inputs`
        uint8 [4, S] with a row for each of 4, 8, 16 and 32.
    """
    blocks = [frontier.encoded(index) for index in range(len(frontier))]
    weights = _counted([block.weights for block in blocks], _levels_of(frontier))
    return {"weights": weights, "inputs": _counted([block.inputs for block in blocks], INPUT_LEVELS)}


def _counted(rows: Sequence[bytes], levels: Sequence[int]) -> Tensor:
    thresholds_L1 = torch.tensor(levels, dtype=torch.uint8)[:, None]
    found = torch.zeros(len(levels), len(rows[0]), dtype=torch.uint8)
    for row in rows:
        found += _tensor_of(row)[None] >= thresholds_L1
    return found


def _tensor_of(levels: bytes) -> Tensor:
    # frombuffer refuses an empty buffer
    return torch.frombuffer(bytearray(levels), dtype=torch.uint8) if levels else torch.empty(0, dtype=torch.uint8)


def description_of(frontier: Frontier) -> dict[str, Any]:
    """What the head says of a frontier."""
    return {
        "maps": len(frontier),
        "levels": list(_levels_of(frontier)),
        "input_levels": list(INPUT_LEVELS),
        "predicted_loss": [_number(plan.predicted_loss) for plan in frontier],
        "points": [{key: _number(value) for key, value in asdict(point).items()} for point in frontier.points],
        "unit": frontier.unit,
        "machine": frontier.machine,
    }


def _number(value: Any) -> Any:
    """A value as JSON has it: None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_frontier(writer: Writer, head: Head, frontier: Frontier | None) -> Head:
    """Write the table of a frontier into a folder; the head that names it, and no other frontier."""
    files = {part: name for part, name in head.files.items() if part != PART}
    checksums = {part: of for part, of in head.checksums.items() if part != PART}
    if frontier is None:
        return replace(head, files=files, checksums=checksums, frontier=None)
    written = writer.tensors(PART, table_of(frontier), {})
    files[PART], checksums[PART] = written.file, written.checksums
    return replace(head, files=files, checksums=checksums, frontier=description_of(frontier))


def check_stored(frontier: Frontier, stored: Mapping[str, Tensor]) -> None:
    """Raise `PlaneNotResidentError` unless the planes of a frontier's best map, and so of all, are stored.

    Args:
        frontier: the frontier.
        stored: for each weight site the highest level at which each tile can be read, uint8.
    """
    have = torch.cat([stored[s.name].reshape(-1) for s in frontier[0].weight_sites()])
    wanted = _tensor_of(frontier.encoded(0).weights)
    if bool((wanted > have).any()):
        raise PlaneNotResidentError(
            f"the best map of the frontier reads tiles at level {int(wanted[wanted > have].max())} that are stored up "
            f"to {int(have[wanted > have].min())} bits only: make the frontier of levels that are stored"
        )


def load_frontier(path: PathLike) -> Frontier:
    """Read the frontier of a folder.

        chain = fv.load_frontier("out/")

    Raises:
        CheckpointError: the folder is damaged, or holds no frontier.
    """
    with opened(path) as folder:
        return read_frontier(folder)


def frontier_later(folder: Folder) -> Callable[[], Frontier]:
    """A function that reads the frontier of a folder when it is called (`foveate.checkpoint.folder.later`)."""
    return later(folder, _about, read_frontier, "its frontier")


def _about(head: Head) -> list[Any]:
    """What a head says of its frontier: equal for two heads if their frontiers are the same."""
    return [[asdict(s) for s in head.sites], head.other_bytes, head.frontier, head.checksums.get(PART)]


def read_frontier(folder: Folder) -> Frontier:
    """Read the frontier of an open folder; errors as for `load_frontier`."""
    head, path = folder.head, folder.path
    if head.frontier is None or PART not in head.files:
        raise CheckpointError(f"{path} holds no frontier: foveate.save(model, path, frontier=...) stores one")
    weights = [s for s in head.sites if s.kind == "weight"]
    inputs = [s for s in head.sites if s.kind == "input"]
    try:
        about = head.frontier
        count = about["maps"]
        if type(count) is not int or not 1 <= count <= MOST_MAPS:
            raise ValueError(f"maps (={count!r}) is not a number from 1 to {MOST_MAPS}")
        levels = _levels(about["levels"], _ABOVE_ZERO)
        input_levels = _levels(about["input_levels"], INPUT_LEVELS)
        predicted = _predicted(about["predicted_loss"], count)
        points = tuple(_point(entry) for entry in about["points"])
        shape = (len(levels), sum(s.tiles for s in weights))
        table_LT = _table(folder, "weights", shape, count)
        table_IS = _table(folder, "inputs", (len(input_levels), len(inputs)), count)
        if bool((table_IS[:1] != count).any()):
            raise ValueError("an input has no level in some map")
        maps: list[PrecisionMap] = []
        for index in range(count):
            before = maps[-1].levels if maps else {}
            found = _levels_at(index, table_LT, (0, *levels), weights, before)
            at_inputs = _read_at(index, table_IS, (0, *input_levels))
            found.update(zip((s.name for s in inputs), at_inputs, strict=True))
            maps.append(PrecisionMap(head.sites, found, head.other_bytes, predicted[index], head.other_parameters))
        return Frontier(tuple(maps), points=points, unit=about["unit"], machine=about["machine"])
    except CheckpointError:
        raise
    except (FoveateError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the frontier of {path} is malformed: {error}") from error


def _levels(found: Any, known: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(level) is int for level in found):
        raise ValueError(f"levels (={found!r}) are not a list of levels")
    if not found or found != sorted(set(found)) or not set(found) <= set(known):
        raise ValueError(f"levels (={found}) are not some of {', '.join(map(str, known))} in ascending order")
    return tuple(found)


def _predicted(found: Any, count: int) -> list[float]:
    if not isinstance(found, list) or len(found) != count:
        raise ValueError("predicted_loss has not one entry for each map")
    if not all(entry is None or (type(entry) in (int, float) and math.isfinite(entry)) for entry in found):
        raise ValueError("an entry of predicted_loss is neither null nor a finite number")
    return [math.nan if entry is None else float(entry) for entry in found]


def _point(entry: Any) -> Point:
    fields = dict(entry)
    if fields.get("standard_error") is None:
        fields["standard_error"] = math.nan
    return Point(**fields)


def _table(folder: Folder, name: str, shape: tuple[int, int], count: int) -> Tensor:
    """A table of the folder, checked: no number is above how many maps there are, nor above that of a lower level."""
    table = folder.read(PART, name, shape[0] * shape[1])
    if table.dtype != torch.uint8 or table.shape != shape:
        raise ValueError(f"{name} is {table.dtype} {tuple(table.shape)}, not torch.uint8 {shape}")
    if bool((table > count).any()) or bool((table[1:] > table[:-1]).any()):
        raise ValueError(f"{name} has numbers above {count}, or numbers that rise with the level")
    return table


def _read_at(index: int, table: Tensor, levels: tuple[int, ...]) -> bytes:
    """The level of each column at an index: the highest whose number is above the index, or the first of `levels`."""
    place = (table > index).sum(0)
    return bytes(torch.tensor(levels, dtype=torch.uint8)[place].tolist())


def _levels_at(
    index: int, table_LT: Tensor, levels: tuple[int, ...], sites: Sequence[Site], before: Mapping[str, Levels]
) -> dict[str, Levels]:
    """The levels of each weight at an index. Where they are those of the map before, they are the same object."""
    tiles = _read_at(index, table_LT, levels)
    found: dict[str, Levels] = {}
    at = 0
    for site in sites:
        own = tiles[at : at + site.tiles]
        at += site.tiles
        old = before.get(site.name)
        found[site.name] = old if old == own and old is not None else own
    return found
