"""Profile: what was measured of a model, and the loss that it predicts for a precision map.

The prediction is a sum: each tile and each input costs the loss that was measured for it at its level, and levels of
weights are scaled by what was measured with the whole model at that level (`measured_over_summed`).

Shapes: T tiles of a weight, NT strips of 16 rows, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from foveate.formats.levels import EXACT_LEVELS, INPUT_LEVELS, WEIGHT_LEVELS, input_bits_of
from foveate.precision.maps import PrecisionMap, uniform
from foveate.precision.sites import Levels, Site, stays_float
from foveate.precision.timings import Timings

#: The name of the statistic of a weight whose codes were fitted to its inputs by descent: see `Profile.statistics`.
FITTED = "fitted"
#: The name of the statistic of a weight that keeps exact tiles: see `Profile.statistics`.
EXACT = "exact"


@dataclass(frozen=True, eq=False)
class Profile:
    """What was measured of a model.

    Attributes:
        sites: every site of the model.
        losses: for each weight, float32 [T, 6]: the loss that each tile costs at each of WEIGHT_LEVELS, in the unit of
            the objective. For each input, float32 [1, 4], the same at each of INPUT_LEVELS; an input that calibration
            never saw has no entry.
        other_bytes: bytes of everything that is not a site.
        samples: how many tokens, images or sentences the loss is a mean over.
        objective: the name of the loss (`foveate.collect.objectives`).
        statistics: for each weight: `input_energy` float32 [G] (the mean of A over each group),
            `output_range` float32 [2] (least and greatest of its products, or of the rows looked up), `row_frequency`
            float32 [NT] of an embedding (the share of look-ups that read each strip of rows), `fitted` float32 [6] of a
            weight that was rounded by descent (its loss on other data divided by its loss on the calibration data, at
            each of WEIGHT_LEVELS, or one number for all in profiles of foveate 0.1; `losses` are those on other data),
            `exact` float32 [T] of a weight that keeps exact tiles (16 or 32 for these, 0 for the others). An exact tile
            loses nothing.
            For each input, float32:
            `mean`, `variance` [1], `range` [2] (least, greatest), `entropy` [1] (bits of each value, of 8-bit codes),
            `values` [1] (how many the product reads for each sample), `batch_moments` [2, 2] (the least and the
            greatest mean and variance of a batch), `batch_values` [1].
        notes: what the user should know, a sentence each.
        measured_over_summed: for each of WEIGHT_LEVELS, the loss that was measured with all weights at that level,
            divided by the sum of `losses`; 1 where it was not measured.
        other_parameters: as of `PrecisionMap`.
        timings: how long products take on one machine; None if that was not measured (`foveate.measure_timings`).
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
    timings: Timings | None = None

    def __repr__(self) -> str:
        sites = self.weight_sites()
        weights = sum(s.weights for s in sites)
        left = stays_float(self.other_parameters or {}, weights)
        what = f"{self.objective}, {self.samples:,} samples" + (f"; {left}" if left else "")
        return f"Profile({weights:,} weights at {len(sites)} sites, {what})"

    def predict(self, plan: PrecisionMap) -> float:
        """The loss that the profile expects of a map: the sum over tiles and inputs, where tiles count times their
        level's `measured_over_summed`.
        """
        total = self.predict_inputs(plan.levels)
        for site in self.weight_sites():
            levels, table = plan.levels[site.name], self.losses[site.name].double()
            if levels in EXACT_LEVELS:
                continue
            if isinstance(levels, int):
                column = WEIGHT_LEVELS.index(levels)
                total += float(table[:, column].sum()) * self.measured_over_summed[column]
                continue
            tiles = torch.frombuffer(bytearray(levels), dtype=torch.uint8)
            for level, column, factor in zip(WEIGHT_LEVELS, table.t(), self.measured_over_summed, strict=True):
                total += float(column[tiles == level].sum()) * factor
        return total

    def exact_levels(self, name: str) -> Tensor | None:
        """The level of each tile of a weight that is kept exact, and 0 for the others: uint8 [T]; None if none is."""
        found = self.statistics.get(name, {}).get(EXACT)
        return None if found is None else found.to(torch.uint8)

    def scaled_losses(self, name: str) -> Tensor | None:
        """What each tile of a weight loses at each level, scaled by `measured_over_summed`: float32 [T, 6]; None if the
        profile has no losses of this weight.
        """
        table = self.losses.get(name)
        return None if table is None else table * torch.tensor(self.measured_over_summed, dtype=table.dtype)

    def predict_inputs(self, levels: Mapping[str, Levels]) -> float:
        """The part of the predicted loss that the levels of inputs cost; 0 where it was not measured."""
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
        """How many values of an input its product reads for each sample, the weight of this input in averages. Its
        width where it was not measured.
        """
        measured = self.statistics.get(site.name, {}).get("values")
        return float(site.columns) if measured is None else float(measured)

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
