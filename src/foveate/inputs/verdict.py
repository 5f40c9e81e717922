"""The verdict on adapting: the divergence with it over that of the static map at the same mean bits, on the same data.

Both are compared with the model at every plane that it holds. The interval comes from a bootstrap over blocks of
samples, for tokens of one text depend on each other (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

Legend: n samples, b blocks, R draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.collect.evaluation import evaluating
from foveate.collect.objectives import Objective, run
from foveate.nn.levels import apply, highest_map, withdraw
from foveate.precision.maps import PrecisionMap
from foveate.progress import track

#: Samples of one block of the bootstrap.
BLOCK = 64
_DRAWS = 1000
_DECIDER = "verdict"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether adapting pays.

    Attributes:
        adapting, static: the mean divergence from the model at every plane that it holds.
        interval: the interval of their ratio that holds 95 % of the bootstrap's draws.
        bits: the mean bits while adapting.
        static_bits: the bits of the static map.
        samples: how many were compared.
        unit: of the divergences.
    """

    adapting: float
    static: float
    interval: tuple[float, float]
    bits: float
    static_bits: float
    samples: int
    unit: str

    @property
    def ratio(self) -> float:
        """The divergence while adapting over that of the static map; 1 if both are 0."""
        return self.adapting / self.static if self.static > 0 else 1.0

    @property
    def pays(self) -> bool:
        """Whether adapting loses less, beyond what chance explains."""
        return self.ratio < 1 and self.interval[1] < 1

    def __str__(self) -> str:
        low, high = self.interval
        said = "adapting pays" if self.pays else "no gain was found: the static map does as well"
        return (
            f"{said}: {self.unit} {self.adapting:.5f} at {self.bits:.3f} bits, static {self.static:.5f} at "
            f"{self.static_bits:.3f} bits, ratio {self.ratio:.3f} ({low:.3f} to {high:.3f}, {self.samples} samples)"
        )


def divergences(
    model: nn.Module,
    batches: Sequence[Any],
    objective: Objective,
    ways: Sequence[Callable[[], AbstractContextManager[None]]],
    *,
    reference: nn.Module | None = None,
    what: str = "comparing with the static map",
    progress: bool = True,
) -> list[Tensor]:
    """The divergence of each sample, [n], for each way of reading the model.

    Args:
        model: a quantized model.
        batches: held-out data.
        objective: what is compared.
        ways: contexts in which the model is read in one way. What they decide as `verdict` is withdrawn afterwards.
        reference: the original model; by default the model itself with every plane that it holds.
        what: what is done, as a progress bar says it.
        progress: whether to show a progress bar.
    """
    found: list[list[Tensor]] = [[] for _ in ways]
    best = highest_map(model)
    try:
        with evaluating(model), torch.no_grad():
            for batch in track(batches, what, show=progress):
                if reference is None:
                    apply(model, best, decider=_DECIDER)
                wanted = objective.outcome(run(reference or model, batch), batch)
                for way, parts in zip(ways, found, strict=True):
                    with way():
                        output = run(model, batch)
                    parts.append(objective.divergence(wanted, objective.outcome(output, batch)))
    finally:
        withdraw(model, _DECIDER)
    return [torch.cat(parts) for parts in found]


def static(model: nn.Module, plan: PrecisionMap) -> Callable[[], AbstractContextManager[None]]:
    """A way of reading the model: one map for all inputs."""

    @contextmanager
    def way() -> Iterator[None]:
        apply(model, plan, decider=_DECIDER)
        yield

    return way


def as_decided(
    model: nn.Module, after: Callable[[], None] = lambda: None
) -> Callable[[], AbstractContextManager[None]]:
    """A way of reading the model: as it is without the verdict. `after` is called after each batch."""

    @contextmanager
    def way() -> Iterator[None]:
        withdraw(model, _DECIDER)
        yield
        after()

    return way


def ratio_interval(ours_n: Tensor, theirs_n: Tensor, seed: int = 0) -> tuple[float, float]:
    """The interval of the ratio of two means that holds 95 % of bootstrap draws over blocks of samples."""
    size = min(BLOCK, max(1, len(ours_n) // 8))
    blocks = len(ours_n) // size
    ours_b, theirs_b = (t[: blocks * size].double().view(blocks, size).sum(1) for t in (ours_n, theirs_n))
    drawn_Rb = torch.randint(0, blocks, (_DRAWS, blocks), generator=torch.Generator().manual_seed(seed))
    ratios_R = ours_b[drawn_Rb].sum(1) / theirs_b[drawn_Rb].sum(1).clamp_min(1e-300)
    low, high = torch.quantile(ratios_R, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
