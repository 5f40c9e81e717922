"""What all weights lose together: measured once the planes are there, and put beside the sum of what each loses.

A profile adds up effects that were scored one by one. Errors of different layers meet, though, and at few bits a
change is no longer small, so the sum is off by a factor that hangs mostly on the level. So of some calibration batches
the float model's outcomes are kept, and they are run again through the planes, everything at one level after another.
The ratios of measured to summed correct what a profile predicts (`Profile.measured_over_summed`); which tiles are worth
most is left to the losses as they are (docs/decisions.md).

Batches are kept evenly spread over however many there are, and of their outcomes as many as a bounded memory takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from foveate.collect.objectives import Custom, Objective, run
from foveate.errors import DataError
from foveate.formats.levels import NESTED_LEVELS, WEIGHT_LEVELS
from foveate.nn.registry import Registry
from foveate.precision.profiles import FITTED, Profile
from foveate.progress import track

#: Batches that are kept at most.
MAX_BATCHES = 16
#: Bytes that they take at most, unless one alone takes more; and their outcomes.
_MAX_BYTES = 64 << 20
#: Inputs are read at this level meanwhile: what they lose is counted for itself, and 16 bits lose next to nothing.
_INPUT_LEVEL = 16
_LARGEST_FACTOR = 100.0


def reference_bytes(batch: Any, outcome: int) -> int:
    """Bytes that a witness takes at most, of batches like this one, with so many bytes of outcomes each."""
    return min(MAX_BATCHES * (_bytes_of(batch) + outcome), max(_MAX_BYTES, _bytes_of(batch)) + _MAX_BYTES)


def _bytes_of(batch: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(_plain(batch)) if isinstance(t, Tensor))


def _plain(batch: Any) -> Any:
    """A batch in which tensors can be found: mappings, which tokenizers have their own of, as dictionaries."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def copied(batch: Any) -> Any:
    """A batch that stays as it is when whoever made it fills its memory with the next one."""
    return tree_map_only(Tensor, torch.clone, _plain(batch))


class ReferenceOutputs:
    """Some batches, and what the float model made of them.

    Attributes:
        samples: outcomes kept.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._every = 1
        self._seen = 0
        self._kept: list[tuple[Any, int, Tensor]] = []  # batch, every which outcome, outcomes

    @property
    def samples(self) -> int:
        """Outcomes that are kept."""
        return sum(len(outcome) for _, _, outcome in self._kept)

    @property
    def compares(self) -> bool:
        """Whether what is measured is what profiles sum: not of a loss of the user's, which may have any unit."""
        return not isinstance(self._objective, Custom)

    def wants(self, batch: Any) -> bool:
        """Whether the next batch is to be kept; `keep` then takes it."""
        if not self.compares:
            return False
        index, self._seen = self._seen, self._seen + 1
        most = max(1, min(MAX_BATCHES, _MAX_BYTES // max(_bytes_of(batch), 1)))
        while index % self._every == 0 and len(self._kept) >= most:
            self._every *= 2
            self._kept = self._kept[::2] if most > 1 else self._kept
        return index % self._every == 0 or not self._kept

    def keep(self, batch: Any, output: Any) -> None:
        """Take a batch, with what the float model put out."""
        outcome_nD = self._objective.outcome(output, batch).detach()
        step = max(1, -(-MAX_BATCHES * outcome_nD.numel() * outcome_nD.element_size() // _MAX_BYTES))
        self._kept.append((copied(batch), step, outcome_nD[::step].clone()))

    def divergence(self, model: nn.Module) -> float:
        """The mean over samples of how far a model's outcomes are from those that were kept."""
        total = 0.0
        with torch.no_grad():
            for batch, step, wanted_nD in self._kept:
                outcome_nD = self._objective.outcome(run(model, batch), batch)[::step]
                total += float(self._objective.divergence(wanted_nD, outcome_nD).double().sum())
        return total / self.samples


def with_measured(
    profile: Profile, model: nn.Module, registry: Registry, reference_outputs: ReferenceOutputs, progress: bool
) -> Profile:
    """The profile with what is measured of each level over what is summed of it, or with a note why that is not known.

    A factor under 1 is taken for 1: of all data those of calibration flatter a model most, and a model that has
    memorised them more than any. Without weights (level 0) it is that of 2 bits.

    Args:
        profile: of the model.
        model, registry: on planes; in evaluation mode. The levels in force afterwards are any.
        witness: what to compare with.
        progress: whether to show how far it is.
    """
    try:
        measured = (
            _measured(profile, model, registry, reference_outputs, progress) if reference_outputs.samples > 1 else {}
        )
        why = "there is no second sample" if reference_outputs.samples < 2 else "an output is not finite"
        why = why if reference_outputs.compares else "the loss given is not the divergence that is measured"
    except DataError as error:
        measured, why = {}, str(error)
    if not measured:
        return replace(profile, notes=(*profile.notes, f"what all weights lose together was not measured: {why}"))
    return replace(profile, measured_over_summed=tuple(measured[level] for level in WEIGHT_LEVELS))


def _measured(
    profile: Profile, model: nn.Module, registry: Registry, reference_outputs: ReferenceOutputs, progress: bool
) -> dict[int, float]:
    """A factor for each level; nothing if an output is not finite."""
    summed = _summed(profile)
    factors: dict[int, float] = {}
    for level in track(NESTED_LEVELS, "measuring", show=progress):
        plan = profile.uniform(level, _INPUT_LEVEL)
        registry.apply(plan, plan)
        measured = reference_outputs.divergence(model)
        if not math.isfinite(measured):
            return {}
        factors[level] = min(max(measured / summed[level], 1.0), _LARGEST_FACTOR) if summed[level] > 0 else 1.0
    return {0: factors[NESTED_LEVELS[0]], **factors}


def _summed(profile: Profile) -> dict[int, float]:
    """For each level what the weights lose one by one, on calibration's own data."""
    total = torch.zeros(len(WEIGHT_LEVELS), dtype=torch.float64)
    for site in profile.weight_sites():
        fitted = profile.statistics[site.name].get(FITTED)
        total += profile.losses[site.name].double().sum(0) / (1.0 if fitted is None else fitted.double())
    return dict(zip(WEIGHT_LEVELS, total.tolist(), strict=True))
