"""Profile: what was measured of a model, and what it predicts of a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from foveate.formats.levels import INPUT_LEVELS, WEIGHT_LEVELS, input_bits_of
from foveate.precision.maps import PrecisionMap, uniform
from foveate.precision.sites import Levels as Levels
from foveate.precision.sites import Site as Site
from foveate.precision.sites import find_sites as find_sites
from foveate.precision.sites import meant_sites as meant_sites
from foveate.precision.sites import stays_float
from foveate.precision.sites import tile_levels as tile_levels

#: The statistic of a weight whose codes were fitted to its inputs: see `Profile.statistics`.
FITTED = "fitted"


@dataclass(frozen=True, eq=False)
class Profile:
    """What was measured.

    Attributes:
        sites: every site of the model.
        losses: for each weight, float32 [T, 6]: the loss each tile costs at each of WEIGHT_LEVELS, in the objective's
            unit; for each input, float32 [1, 4], at each of INPUT_LEVELS (none of an input that calibration never saw).
        other_bytes: bytes of everything that is no site.
        samples: tokens, images or sentences that the loss is a mean over.
        objective: which loss: see `foveate.collect.objectives`.
        statistics: for each weight, tensors worth keeping: `input_energy` float32 [G] (the mean of A over each group),
            `output_range` float32 [2] (of its products, or of the rows looked up), `row_frequency` float32 [NT] of an
            embedding (the share of look-ups that read each strip of rows), `fitted` float32 [6] of one rounded by
            descent (what it loses on other data over what it loses on calibration's, at each of WEIGHT_LEVELS, or one
            number for all in profiles of foveate 0.1; `losses` are those on other data). For each input, float32:
            `mean`, `variance` [1], `range` [2] (least, greatest), `entropy` [1] (bits a value, of 8-bit codes),
            `values` [1] (read by the product, a sample), `batch_moments` [2, 2] (the least and the greatest mean and
            variance of a batch), `batch_values` [1].
        notes: things the user should know, a sentence each.
        measured_over_summed: for each of WEIGHT_LEVELS, the divergence that was measured with all weights at that level
            over the sum of `losses`; 1 where it was not measured.
        other_parameters: as of `PrecisionMap`.
    """

    sites: tuple[Site, ...]
    losses: Mapping[str, Tensor]
    other_bytes: int
    samples: int
    objective: str
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measured_over_summed: tuple[float, ...] = (1.0,) * len(WEIGHT_LEVELS)
    other_parameters: Mapping[str, int] | None = None

    def __repr__(self) -> str:
        sites = self.weight_sites()
        weights = sum(s.weights for s in sites)
        left = stays_float(self.other_parameters or {}, weights)
        what = f"{self.objective}, {self.samples:,} samples" + (f"; {left}" if left else "")
        return f"Profile({weights:,} weights at {len(sites)} sites, {what})"

    def predict(self, plan: PrecisionMap) -> float:
        """The loss that the profile expects of a map: the sum over tiles and inputs, each level of weights times what
        was measured of it over what was summed.
        """
        total = self.predict_inputs(plan.levels)
        for site in self.weight_sites():
            levels, table = plan.levels[site.name], self.losses[site.name].double()
            if isinstance(levels, int):
                column = WEIGHT_LEVELS.index(levels)
                total += float(table[:, column].sum()) * self.measured_over_summed[column]
                continue
            tiles = torch.frombuffer(bytearray(levels), dtype=torch.uint8)
            for level, column, factor in zip(WEIGHT_LEVELS, table.t(), self.measured_over_summed, strict=True):
                total += float(column[tiles == level].sum()) * factor
        return total

    def predict_inputs(self, levels: Mapping[str, Levels]) -> float:
        """The part of it that the levels of inputs cost; 0 where it was not measured."""
        return sum(
            float(self.losses[s.name][0, INPUT_LEVELS.index(cast(int, levels[s.name]))])
            for s in self.input_sites()
            if s.name in self.losses
        )

    def weight_sites(self) -> list[Site]:
        """The sites that hold weights."""
        return [s for s in self.sites if s.kind == "weight"]

    def input_sites(self) -> list[Site]:
        """The sites that are inputs."""
        return [s for s in self.sites if s.kind == "input"]

    def values_read(self, site: Site) -> float:
        """How many values of an input its product reads, a sample: what averages over inputs are weighted by. Its width
        where it was not measured.
        """
        kept = self.statistics.get(site.name, {}).get("values")
        return float(site.columns) if kept is None else float(kept)

    def input_bits(self, plan: PrecisionMap) -> float:
        """The average bits of a map's inputs (`input_bits_of` each level), over the values that products read."""
        read = {s.name: self.values_read(s) for s in self.input_sites()}
        total = sum(read.values())
        return (
            sum(input_bits_of(cast(int, plan.levels[name])) * n for name, n in read.items()) / total if total else 0.0
        )

    def uniform(self, level: int, input_level: int | None = None) -> PrecisionMap:
        """The map with every weight at one level."""
        plan = uniform(self.sites, level, self.other_bytes, input_level)
        return replace(plan, predicted_loss=self.predict(plan), other_parameters=self.other_parameters)
