"""Levels of inputs under an average of bits, by the same solver as for weights, with bits of values in place of bytes.

The average is over the values that products read. A convolution reads each pixel as often as its kernel covers it, and
q, k and v read their common input three times. The profile has the loss of each input at each level;
`variance_proxy` replaces these losses by estimates from the variance of the activations alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from foveate.allocate.constraints import Constraints
from foveate.allocate.problem import Choices
from foveate.allocate.solve import solve_bytes
from foveate.errors import BudgetError
from foveate.formats.levels import INPUT_LEVELS, input_bits_of
from foveate.precision.profiles import Profile


def levels_of_inputs(profile: Profile, constraints: Constraints) -> dict[str, int] | None:
    """The level of each input: one for all, or chosen for an average of bits; None if neither is asked for."""
    if constraints.input_bits is not None:
        return choose_inputs(profile, constraints.input_bits, tuple(constraints.input_levels))
    level = constraints.input_level
    return None if level is None else dict.fromkeys((s.name for s in profile.input_sites()), level)


def choose_inputs(profile: Profile, bits: float, allowed: tuple[int, ...]) -> dict[str, int]:
    """The level of every input: the least loss with at most `bits` on average over the values that products read.

    Raises:
        BudgetError: no level is low enough, or the profile has no losses of inputs.
    """
    sites = profile.input_sites()
    if not sites:
        return {}
    measured = [s for s in sites if s.name in profile.losses]
    if not measured:
        raise BudgetError("the profile does not say what inputs cost: quantize the original again")
    columns = torch.tensor([INPUT_LEVELS.index(level) for level in allowed])
    most = 1.0 + sum(float(profile.losses[s.name].max()) for s in measured)
    unknown = (
        most * torch.arange(len(INPUT_LEVELS), 0, -1.0)[None]
    )  # inputs that calibration never reached count as the most sensitive
    losses = torch.cat([profile.losses.get(s.name, unknown) for s in sites]).double()[:, columns]
    read = torch.tensor([profile.values_read(s) for s in sites], dtype=torch.float64)
    if not bool(torch.isfinite(losses).all()):
        raise BudgetError("the profile holds losses of inputs that are not finite")
    cost = torch.tensor([input_bits_of(level) for level in allowed], dtype=torch.float64) * read[:, None]
    problem = Choices(allowed, losses.cummin(1).values, cost)
    note = f"no input levels average {bits:g} bits: the least is {input_bits_of(allowed[0]):g}"
    # the average of an existing map, given as a budget, must not fail by a rounding error
    choice = solve_bytes(problem, bits * float(read.sum()) * (1 + 1e-9), note)
    return {s.name: allowed[i] for s, i in zip(sites, choice.tolist(), strict=True)}


def variance_proxy(profile: Profile) -> Profile:
    """The same profile with the losses of inputs estimated from the variance of their activations, without gradients.

    An input of variance v is taken to lose v 4^-b at b bits for each value that a product reads, as a uniform quantizer
    does. The unit is that of the activation squared: the order of inputs counts, and sums over inputs mean little. It
    is the second of the two rules in US patent 12265905: gradient magnitude, or "a proxy, like the variance of
    activation values". docs/decisions.md compares the two. Maps allocated with this profile predict the loss of weights
    alone.

    Raises:
        BudgetError: the profile has no statistics of inputs.
    """
    estimated = _estimated_losses(profile)
    if profile.input_sites() and not estimated:
        raise BudgetError("the profile has no statistics of inputs: quantize the original again")
    # the estimates are scaled down until they do not change the predicted loss of a map, which is that of its weights
    unit = 1e-9 / max(sum(float(table.sum()) for table in estimated.values()), 1e-30)
    return replace(profile, losses={**profile.losses, **{name: table * unit for name, table in estimated.items()}})


def _estimated_losses(profile: Profile) -> Mapping[str, torch.Tensor]:
    noise = torch.tensor([[4.0**-level if level < 32 else 0.0 for level in INPUT_LEVELS]])
    return {
        s.name: float(profile.statistics[s.name]["variance"]) * profile.values_read(s) * noise
        for s in profile.input_sites()
        if "variance" in profile.statistics.get(s.name, {})
    }
