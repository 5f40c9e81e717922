"""Rolling importance: what each tile of a weight is worth for the data that a model sees now. Pure functions.

Calibration measured what each tile costs at each level, S = 1/2 f sum_ij G_i A_j dW_ij^2. Here f is the share of tokens
that reach the weight (1, but for experts), A the energy of its inputs and G that of its outputs' gradients. When the
task moves, f and A move with it, and they can be seen without gradients. G is kept. So the losses of a tile are
multiplied by f A now over f A at calibration, for its group of inputs. An embedding has no inputs: there it is the
frequency of look-ups of its strip of rows.

The estimate of f A is a decayed mean over tokens: decayed sum over decayed number of tokens, so that it is weighted by
tokens and has no bias toward zero at its start. It can begin with the calibration's own mean, counted as so many
tokens (`start`); that is the warm-up.

Shapes: T tiles, NT strips of 16 rows, G groups of inputs. Sums and means are [1, G], or of an embedding [NT, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from foveate.errors import DataError, SiteError
from foveate.precision.profiles import Profile
from foveate.precision.sites import Site

#: Importance counts as at most so many times more or less than at calibration.
_FURTHEST = 1e3
#: How often an expert that calibration never met was counted (`foveate.calibrate.routing`).
_UNSEEN_COUNT = 0.5


@dataclass(frozen=True, kw_only=True)
class Decay:
    """How fast what was seen is forgotten.

        Decay(keep=0.5, tokens=8192)  # a half-life of 8192 tokens
        Decay(keep=0.9, tokens=None)  # 0.9 of the old and 0.1 of the new at each update, whatever its tokens

    Attributes:
        keep: the share that is kept, above 0 and below 1.
        tokens: after so many tokens of the stream; None for each update.

    Raises:
        DataError: a value is not one of these.
    """

    keep: float = 0.5
    tokens: int | None = 8192

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise DataError(f"keep (={self.keep!r}) is not above 0 and below 1")
        if self.tokens is not None and (type(self.tokens) is not int or self.tokens < 1):
            raise DataError(f"tokens (={self.tokens!r}) is not a positive whole number")

    def after(self, tokens: float) -> float:
        """The share that is kept after so many tokens.

        >>> Decay(keep=0.5, tokens=100).after(200)
        0.25
        """
        return self.keep if self.tokens is None else float(self.keep ** (tokens / self.tokens))


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What was seen at one weight: a sum over tokens, and how many tokens.

    Attributes:
        sums: float64 [1, G], over rows of input the mean square of each group; of an embedding [NT, 1], look-ups.
        tokens: the tokens that could have reached the weight; for an expert those of its layer.
    """

    sums: Tensor
    tokens: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Rolling:
    """The state of rolling importance.

    Attributes:
        weights: for each weight that is followed its decayed sums.
        tokens: all tokens of the stream so far, not decayed.
        refused: how many observations were left out because they held NaN, Inf or negative sums.
    """

    weights: Mapping[str, Seen]
    tokens: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    def means(self) -> dict[str, Tensor]:
        """The estimate of f A for each weight, float64 [1, G] or [NT, 1]; weights without any token are left out."""
        return {name: seen.sums / seen.tokens for name, seen in self.weights.items() if seen.tokens > 0}


def start(means: Mapping[str, Tensor], tokens: float = 0.0) -> Rolling:
    """The state at the beginning of a stream.

    Args:
        means: for each weight to follow the mean to begin with: `baseline(profile)`, or that of a task.
        tokens: how many tokens the means count as; with 0 the first observations count alone.

    Raises:
        DataError: a mean is not finite or is negative, or `tokens` is negative.
    """
    if not 0 <= tokens < math.inf:
        raise DataError(f"tokens (={tokens!r}) is not a number from 0 on")
    for name, mean in means.items():
        if not _is_sound(mean):
            raise DataError(f"the mean of {name} is not finite and at least 0 everywhere")
    return Rolling(weights={name: Seen(sums=mean.double() * tokens, tokens=tokens) for name, mean in means.items()})


def update(state: Rolling, seen: Mapping[str, Seen], decay: Decay, tokens: int) -> Rolling:
    """Take what was seen in one pass.

    Only weights that were seen decay. An observation with NaN, Inf, a negative sum or another shape is left out, and
    counted.

    Args:
        state: the state before.
        seen: what was seen, by the weights' names; names that are not followed are left out.
        decay: how fast the past is forgotten.
        tokens: all tokens of the stream since the last update, of passes that were not observed too.
    """
    keep = decay.after(tokens)
    weights, refused = dict(state.weights), 0
    for name, now in seen.items():
        before = weights.get(name)
        if before is None or not now.tokens:
            continue
        sound = 0 < now.tokens < math.inf and now.sums.shape == before.sums.shape and _is_sound(now.sums)
        if not sound:
            refused += 1
            continue
        weights[name] = Seen(
            sums=keep * before.sums + now.sums.double(), tokens=keep * before.tokens + float(now.tokens)
        )
    return replace(state, weights=weights, tokens=state.tokens + tokens, refused=state.refused + refused)


def baseline(profile: Profile) -> dict[str, Tensor]:
    """f A at calibration for each weight whose inputs, or look-ups, the profile kept: float64 [1, G] or [NT, 1].

    An expert that calibration never met counts as the average expert of its layer, met half a time, as in the profile.
    """
    found: dict[str, Tensor] = {}
    unmet: list[str] = []
    for site in profile.weight_sites():
        kept = profile.statistics.get(site.name, {})
        if "input_energy" in kept:
            frequency = float(kept["routing_frequency"]) if "routing_frequency" in kept else 1.0
            if frequency == 0:
                unmet.append(site.name)
            else:
                found[site.name] = kept["input_energy"].double()[None] * frequency
        elif "row_frequency" in kept:
            found[site.name] = kept["row_frequency"].double()[:, None]
    for name in unmet:
        same = [n for n in found if _part(n) == _part(name) and "routing_frequency" in profile.statistics[n]]
        if same:
            energy = torch.stack([profile.statistics[n]["input_energy"].double() for n in same]).mean(0)
            found[name] = energy[None] * (_UNSEEN_COUNT / max(profile.samples, 1))
    return found


def ratios(profile: Profile, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By what the losses of each tile are to be multiplied: f A of `means` over f A at calibration, float64 [T].

    A ratio is at least 0.001 and at most 1000. It is 1 for weights that are not in `means`.

    Raises:
        SiteError: a mean does not have the shape of its weight.
    """
    known = baseline(profile)
    found = {}
    for site in profile.weight_sites():
        mean, before = means.get(site.name), known.get(site.name)
        if mean is None or before is None:
            found[site.name] = torch.ones(site.tiles, dtype=torch.float64)
            continue
        if mean.shape != before.shape:
            raise SiteError(f"{site.name}: a mean of shape {list(mean.shape)} where {list(before.shape)} is known")
        # what calibration never saw may be rare and not absent: both sides get a thousandth of the weight's average
        least = before.mean() / _FURTHEST
        ratio = torch.ones_like(before) if not float(least) else (mean.double() + least) / (before + least)
        found[site.name] = of_tiles(site, ratio.clamp(1 / _FURTHEST, _FURTHEST))
    return found


def of_tiles(site: Site, values: Tensor) -> Tensor:
    """Values of groups [1, G], or of strips [NT, 1], as values of tiles [T], in the order nt * G + gi."""
    return values.expand(site.grid).flatten()


def mean_ratios(profile: Profile, by: Mapping[str, Tensor]) -> dict[str, float]:
    """The importance of each weight over that of calibration: its tiles' mean ratio, by what each is worth."""
    found = {}
    for site in profile.weight_sites():
        worth = profile.losses[site.name][:, 0].double()
        found[site.name] = float((worth * by[site.name]).sum() / worth.sum().clamp_min(1e-300))
    return found


def rescaled(profile: Profile, by: Mapping[str, Tensor]) -> Profile:
    """The profile with the losses of each weight's tiles multiplied by `by`, [T]; the profile that `fv.allocate` takes.

    fv.allocate(rescaled(profile, ratios(profile, state.means())), fv.Budget(bits=3.0))
    """
    losses = {
        name: (table.double() * by[name][:, None]).float() if name in by else table
        for name, table in profile.losses.items()
    }
    return replace(profile, losses=losses)


def _is_sound(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all()) and bool((values >= 0).all())


def _part(name: str) -> tuple[str, str]:
    """The layer of an expert's weight, and which of its projections it is: `..experts.5.down_proj:weight`."""
    layer, _, part = name.rsplit(".", 2) if name.count(".") >= 2 else ("", "", name)
    return layer, part
