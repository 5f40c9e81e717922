"""PrecisionMap: a level for each site of a model, and the exact bytes that these levels take.

    measure -> Profile -> allocate -> PrecisionMap -> apply

A map gives each site one level, or one for each tile of a weight. It counts three kinds of bytes: *stored*, in the
files of a folder; *resident*, in memory; and *read*, by one token. Beside the maps themselves this module has the
simplest ways to make one, `uniform` and `uniform_of_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

from foveate.errors import LevelError, SiteError
from foveate.formats.levels import EXACT_LEVELS, TILE_LEVELS, WEIGHT_LEVELS, cache_bits_of
from foveate.precision.sites import Levels as Levels
from foveate.precision.sites import Site as Site
from foveate.precision.sites import checked_levels, level_counts, stays_float
from foveate.precision.sites import find_sites as find_sites
from foveate.precision.sites import meant_sites as meant_sites
from foveate.precision.sites import tile_levels as tile_levels
from foveate.sizes import format_bytes


@dataclass(frozen=True)
class PrecisionMap:
    """A level for each site. Frozen; `with_level` gives a changed copy.

    Attributes:
        sites: every site of the model.
        levels: for each site's name one level; for a weight or a cache also bytes, one for each tile or head.
        other_bytes: bytes of everything that is not a site (norms, biases, buffers); the same in every map.
        predicted_loss: the loss that the profile predicts, in the unit of the objective (for language models nats for
            each token); NaN if unknown.
        other_parameters: how many parameters are not at a site and stay float, by the class of their module; None if
            that is not known (in maps of foveate 0.1).
    """

    sites: tuple[Site, ...]
    levels: Mapping[str, Levels] = field(hash=False)
    other_bytes: int = 0
    predicted_loss: float = field(default=float("nan"), compare=False)
    other_parameters: Mapping[str, int] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        checked: dict[str, Levels] = {}
        for site in self.sites:
            if site.name not in self.levels:
                raise SiteError(f"the map has no level for site {site.name!r}")
            checked[site.name] = checked_levels(site, self.levels[site.name])
        unknown = set(self.levels) - set(checked)
        if unknown:
            raise SiteError(f"the map names sites that are not listed: {', '.join(sorted(unknown)[:5])}")
        object.__setattr__(self, "levels", MappingProxyType(checked))

    def __reduce__(self) -> Any:
        other = None if self.other_parameters is None else dict(self.other_parameters)
        return PrecisionMap, (self.sites, dict(self.levels), self.other_bytes, self.predicted_loss, other)

    def weight_sites(self) -> Iterator[Site]:
        """The sites that hold weights."""
        return (s for s in self.sites if s.kind == "weight")

    def counts(self, site: Site) -> dict[int, int]:
        """Tiles of a weight at each level."""
        return dict(zip(TILE_LEVELS, level_counts(site, self.levels[site.name]), strict=True))

    def mean_level(self, site: Site) -> float:
        """The mean level of a weight's tiles, or the level of an input."""
        levels = self.levels[site.name]
        return float(levels) if isinstance(levels, int) else sum(levels) / max(len(levels), 1)

    def tile_bytes(self, site: Site) -> int:
        """Bytes of a weight's planes and scales, and of its exact tiles."""
        costs = site.tile_costs()
        return sum(n * cost for n, cost in zip(level_counts(site, self.levels[site.name]), costs, strict=True))

    def has_exact(self, site: Site) -> bool:
        """Whether any tile of a weight is exact."""
        counts = self.counts(site)
        return any(counts[level] for level in EXACT_LEVELS)

    @property
    def bytes_stored(self) -> int:
        """Bytes of the tensors in the files of a folder that stores only the planes of this map."""
        return self.other_bytes + sum(self.tile_bytes(s) + s.stored_overhead() for s in self.weight_sites())

    @property
    def bytes_resident(self) -> int:
        """Bytes in memory of a model that was loaded with only the planes of this map."""
        exact = sum(s.exact_overhead() for s in self.weight_sites() if self.has_exact(s))
        return exact + self.other_bytes + sum(self.tile_bytes(s) + s.resident_overhead() for s in self.weight_sites())

    @property
    def bytes_read(self) -> int:
        """Bytes that one token reads: planes and scales (of an embedding the share of one row), and everything that is
        not a site.
        """
        return self.other_bytes + round(
            sum(self.tile_bytes(s) * s.rows_read / max(s.rows, 1) for s in self.weight_sites())
        )

    @property
    def bits(self) -> float:
        """Average bits of a weight on planes, as stored: the planes, scales, gains and tile levels of all sites,
        embeddings included, divided by how many weights they have.
        """
        weights = sum(s.weights for s in self.weight_sites())
        return 8.0 * (self.bytes_stored - self.other_bytes) / max(weights, 1)

    @property
    def bits_of_model(self) -> float:
        """Average bits of a parameter of the whole model, as stored, including those that stay float; NaN if their
        number is not known.
        """
        if self.other_parameters is None:
            return math.nan
        weights = sum(s.weights for s in self.weight_sites())
        return 8.0 * self.bytes_stored / max(weights + sum(self.other_parameters.values()), 1)

    @property
    def stays_float(self) -> str:
        """Which parameters of the model are not on planes, in a sentence; empty if they are few or not known."""
        return stays_float(self.other_parameters or {}, sum(s.weights for s in self.weight_sites()))

    @property
    def cache_bits(self) -> float:
        """Average bits of a cached number. Ranges of groups are included, recent tokens that are kept exact are not;
        NaN without cache sites.
        """
        caches = [s for s in self.sites if s.kind == "cache"]
        bits = 0.0
        for site in caches:
            for level in tile_levels(self.levels[site.name], site.tiles):
                bits += site.columns * cache_bits_of(level, site.group)
        return bits / sum(s.rows * s.columns for s in caches) if caches else float("nan")

    def __repr__(self) -> str:
        if all(s.kind == "cache" for s in self.sites) and self.sites:
            taken = f"{self.cache_bits:.3f} bits a cached number"
        else:
            whole = "" if self.other_parameters is None else f"{self.bits_of_model:.3f} bits a parameter of the model, "
            taken = f"{self.bits:.3f} bits a weight on planes, {whole}{format_bytes(self.bytes_resident)} in memory"
        known = math.isfinite(self.predicted_loss)
        lost = f"predicted loss {self.predicted_loss:.4g}" if known else "loss not predicted"
        left = f"; {self.stays_float}" if self.stays_float else ""
        return f"PrecisionMap({taken}, {lost}, {len(self.sites)} sites{left})"

    def with_level(self, pattern: str, level: int) -> PrecisionMap:
        """A copy in which all sites that a shell pattern selects have `level`: the weights whose names match, or if
        none do, the inputs or caches. The predicted loss of the copy is NaN; `Profile.predict` gives it.

            plan.with_level("*", 6)  # all weights
            plan.with_level("*.mlp.*:input", 16)

        Raises:
            SiteError: the pattern matches no site.
            LevelError: sites of that kind cannot have the level.
        """
        hits = meant_sites(self.sites, pattern)
        if type(level) is not int:
            raise LevelError(f"level (={level!r}) is not a whole number")
        return replace(self, levels={**self.levels, **{s.name: level for s in hits}}, predicted_loss=float("nan"))

    def to_json(self) -> dict[str, Any]:
        """The map as JSON. The levels of a site are one number, or zones: runs [[level, tiles], ...]."""
        return {
            "levels": {
                n: v if isinstance(v, int) else [[level, len(list(run))] for level, run in groupby(v)]
                for n, v in self.levels.items()
            },
            "predicted_loss": None if self.predicted_loss != self.predicted_loss else self.predicted_loss,
        }

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        sites: Sequence[Site],
        other_bytes: int,
        other_parameters: Mapping[str, int] | None = None,
    ) -> PrecisionMap:
        """The inverse of `to_json`; raises `LevelError` or `SiteError` if the data do not fit the sites."""
        tiles = {s.name: s.tiles for s in sites}

        def expanded(name: str, runs: list[list[int]]) -> bytes:
            # the sum is checked before bytes are made: a malformed count could ask for any amount of memory
            if any(count < 0 for _, count in runs) or sum(count for _, count in runs) != tiles.get(name):
                raise ValueError(f"the zones of {name!r} are not of its {tiles.get(name)} tiles")
            return b"".join(bytes([level]) * count for level, count in runs)

        try:
            levels: dict[str, Levels] = {
                name: v if type(v) is int else expanded(name, v) for name, v in data["levels"].items()
            }
            loss = data.get("predicted_loss")
            predicted = float("nan") if loss is None else float(loss)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise LevelError(f"malformed precision map: {error!r}") from error
        return cls(tuple(sites), levels, other_bytes, predicted, other_parameters)


def input_level_for(weight_level: float) -> int:
    """The level of an input whose weight is read at `weight_level` bits on average: 8, but 16 for weights above 6 bits.

    An input row of 8 bits loses several times as much as weights of 8 bits do, and much less than weights of up to 6
    bits do (docs/decisions.md).
    """
    return 16 if weight_level > 6 else 8


def uniform(sites: Sequence[Site], level: int, other_bytes: int = 0, input_level: int | None = None) -> PrecisionMap:
    """The map with every weight at one level and every input at another, `input_level_for(level)` if not given."""
    if input_level is None:
        input_level = input_level_for(level)
    return PrecisionMap(
        tuple(sites), {s.name: level if s.kind == "weight" else input_level for s in sites}, other_bytes
    )


def uniform_of_bytes(plan: PrecisionMap) -> PrecisionMap:
    """Uniform precision at the bytes of another map: the highest level that fits everywhere, and one level more at
    evenly spaced tiles for the bytes that are left.

    This needs no measurement, so it is the baseline that an allocated map must beat. Inputs keep their levels of
    `plan`.
    """
    target = sum(plan.tile_bytes(s) for s in plan.weight_sites())
    sites = list(plan.weight_sites())
    totals = [sum(s.tiles * s.tile_costs()[i] for s in sites) for i in range(len(WEIGHT_LEVELS))]
    base = max((i for i, total in enumerate(totals) if total <= target), default=0)
    levels: dict[str, Levels] = dict(plan.levels)
    above = min(base + 1, len(WEIGHT_LEVELS) - 1)
    share = (
        (target - totals[base]) / (totals[above] - totals[base])
        if above > base and totals[above] > totals[base]
        else 0.0
    )
    due = 0.0
    for site in sites:
        cells = bytearray()
        for _ in range(site.tiles):
            due += share
            cells.append(WEIGHT_LEVELS[above if due >= 1 - 1e-9 else base])
            due -= due >= 1 - 1e-9
        levels[site.name] = bytes(cells)
    return replace(plan, levels=levels, predicted_loss=float("nan"))
