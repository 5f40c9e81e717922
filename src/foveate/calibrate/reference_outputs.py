"""Reference outputs: what all weights lose together, measured on planes and compared with the sum of their own losses.

A profile adds up losses that were scored one weight at a time. But errors of different layers interact, and at few bits
they are no longer small. So the sum is off by a factor that depends mostly on the level. To measure it, outputs of the
float model on some calibration batches are kept as reference outputs. When the planes are there, the same batches run
at one uniform level after another. The ratios of measured to summed loss correct what a profile predicts
(`Profile.measured_over_summed`). Which tiles are worth the most is left to the single losses (docs/decisions.md).

The batches are spread evenly over the data, however many there are, and their outputs take a bounded memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from foveate.calibrate.processes.group import Processes
from foveate.collect.objectives import Custom, Objective, run
from foveate.errors import DataError
from foveate.formats.levels import NESTED_LEVELS, WEIGHT_LEVELS
from foveate.nn.registry import Registry
from foveate.precision.profiles import FITTED, Profile
from foveate.progress import Bar

#: The most batches that are kept.
MAX_BATCHES = 16
#: Of larger batches fewer are kept: with this many samples, of some batches at least, the mean divergence is known well
#: enough.
_SAMPLES, _SOME_BATCHES = 2048, 4
#: The most bytes that the batches take, unless one alone takes more; and the most bytes that their outputs take.
_MAX_BYTES = 64 << 20
#: The level of inputs in the measurement: their losses are counted separately, and 16 bits lose almost nothing.
_INPUT_LEVEL = 16
_LARGEST_FACTOR = 100.0


def batches_compared(samples: int) -> int:
    """How many batches are kept of those with so many samples each."""
    return min(MAX_BATCHES, max(_SOME_BATCHES, _SAMPLES // max(samples, 1)))


def reference_bytes(batch: Any, outcome: int) -> int:
    """The most bytes that reference outputs take, for batches like this one with `outcome` bytes of output each."""
    return min(MAX_BATCHES * (_bytes_of(batch) + outcome), max(_MAX_BYTES, _bytes_of(batch)) + _MAX_BYTES)


def _bytes_of(batch: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(_plain(batch)) if isinstance(t, Tensor))


def _plain(batch: Any) -> Any:
    """A batch whose tensors can be found: mappings, such as the classes of tokenizers, become dictionaries."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def copied(batch: Any) -> Any:
    """A copy of a batch, which stays as it is when a data loader reuses its memory."""
    return tree_map_only(Tensor, torch.clone, _plain(batch))


@dataclass(frozen=True, eq=False)
class _Kept:
    """A batch, the step between the samples that are kept, and the outcomes of these."""

    batch: Any
    step: int
    outcome_nD: Tensor


class ReferenceOutputs:
    """Some batches, and the outputs of the float model on them."""

    def __init__(self, objective: Objective, samples: int, processes: Processes | None = None) -> None:
        """
        Args:
            objective: how outputs are compared.
            samples: how many samples a batch has.
            processes: who shares the calibration.
        """
        self._objective, self._enough = objective, batches_compared(samples)
        self._processes = processes or Processes()
        self._every = 1
        self._kept: dict[int, _Kept | None] = {}  # by the place of the batch in the data
        self._chosen = False

    @property
    def samples(self) -> int:
        """How many samples are kept, by all processes; all of them ask at the same time."""
        mine = sum(len(kept.outcome_nD) for kept in self._kept.values() if kept is not None)
        return int(self._processes.total(torch.tensor(mine)))

    @property
    def compares(self) -> bool:
        """Whether the divergence has the unit of the profile's losses: a loss of the user may have another."""
        return not isinstance(self._objective, Custom)

    def choose(self, batches: Sequence[Any]) -> None:
        """Decide beforehand which of these are kept, where each process sees only some of them."""
        for index, batch in enumerate(batches):
            if self.wants(index, batch):
                self._kept[index] = None
        self._chosen = True

    def wants(self, index: int, batch: Any) -> bool:
        """Whether a batch is to be kept; `keep` then takes it. Unless they were chosen, batches come in order."""
        if not self.compares:
            return False
        if self._chosen:
            return index in self._kept
        most = max(1, min(self._enough, _MAX_BYTES // max(_bytes_of(batch), 1)))
        while index % self._every == 0 and len(self._kept) >= most:
            self._every *= 2
            if most > 1:
                self._kept = dict(list(self._kept.items())[::2])
        return index % self._every == 0 or not self._kept

    def keep(self, index: int, batch: Any, output: Any) -> None:
        """Keep a batch with the output of the float model."""
        outcome_nD = self._objective.outcome(output, batch).detach()
        step = max(1, -(-self._enough * outcome_nD.numel() * outcome_nD.element_size() // _MAX_BYTES))
        self._kept[index] = _Kept(copied(batch), step, outcome_nD[::step].clone())

    def divergence(self, model: nn.Module) -> float:
        """The mean divergence of a model's outputs from the reference outputs."""
        sums, failed = torch.zeros(len(self._kept), dtype=torch.float64), ""
        with torch.no_grad():
            for place, kept in enumerate(self._kept.values()):
                if kept is not None:
                    try:
                        outcome_nD = self._objective.outcome(run(model, kept.batch), kept.batch)[:: kept.step]
                    except DataError as error:
                        failed = str(error)
                        break
                    sums[place] = self._objective.divergence(kept.outcome_nD, outcome_nD).double().sum()
        for why in filter(None, self._processes.told(failed)):  # those of one process are those of all
            raise DataError(why)
        return float(sum(self._processes.total(sums).tolist())) / self.samples


def with_measured(
    profile: Profile, model: nn.Module, registry: Registry, reference_outputs: ReferenceOutputs, bar: Bar
) -> Profile:
    """The profile with the measured loss of each level over the summed one, or with a note why that is not known.

    A factor below 1 counts as 1: on calibration's own data a model loses less than on other data, and the more so if it
    has memorised them. Level 0, without weights, has the factor of 2 bits.

    Args:
        profile: the profile of the model.
        model, registry: the model on planes, in evaluation mode. The call changes its levels.
        reference_outputs: the outputs to compare with.
        bar: shows the progress.
    """
    try:
        measured = _measured(profile, model, registry, reference_outputs, bar) if reference_outputs.samples > 1 else {}
        why = "there is no second sample" if reference_outputs.samples < 2 else "an output is not finite"
        why = why if reference_outputs.compares else "the loss given is not the divergence that is measured"
    except DataError as error:
        measured, why = {}, str(error)
    if not measured:
        return replace(profile, notes=(*profile.notes, f"what all weights lose together was not measured: {why}"))
    return replace(profile, measured_over_summed=tuple(measured[level] for level in WEIGHT_LEVELS))


def _measured(
    profile: Profile, model: nn.Module, registry: Registry, reference_outputs: ReferenceOutputs, bar: Bar
) -> dict[int, float]:
    """The factor of each level; empty if an output is not finite."""
    summed = _summed(profile)
    factors: dict[int, float] = {}
    for level in bar.track("comparing", NESTED_LEVELS):
        plan = profile.uniform(level, _INPUT_LEVEL)
        registry.apply(plan)
        measured = reference_outputs.divergence(model)
        if not math.isfinite(measured):
            return {}
        factors[level] = min(max(measured / summed[level], 1.0), _LARGEST_FACTOR) if summed[level] > 0 else 1.0
    return {0: factors[NESTED_LEVELS[0]], **factors}


def _summed(profile: Profile) -> dict[int, float]:
    """The sum of the single losses at each level, on calibration's own data."""
    total = torch.zeros(len(WEIGHT_LEVELS), dtype=torch.float64)
    for site in profile.weight_sites():
        fitted = profile.statistics[site.name].get(FITTED)
        total += profile.losses[site.name].double().sum(0) / (1.0 if fitted is None else fitted.double())
    return dict(zip(WEIGHT_LEVELS, total.tolist(), strict=True))
