"""Timeline: what one training step holds in memory, point by point, and what it would hold with other payloads.

Saved bytes are not peak bytes: a tensor that autograd keeps costs nothing extra while the model holds it anyway, a
compressed copy costs its own bytes from the forward to its own backward, and temporaries come on top. A timeline keeps
these apart. At each point there are the bytes that are no payload, and two shares of what each site stored in the step.
The first is the share that is alive: that part of the compressed bytes is allocated. The second is the share that
nothing else holds: that part of the original would be allocated if it were kept as it is. So the peak with any other
payload sizes is a sum.

    T points in time, S sites
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A stretch of one payload's life.

    Attributes:
        site: the payload's site.
        start, stop: the points at which it is alive; `stop` is not one of them.
        share: how much of all that the site stored in the step it is; 0..1.
        sole_holder: whether nothing but the payload would hold the original.
    """

    site: str
    start: int
    stop: int
    share: float
    sole_holder: bool


@dataclass(frozen=True)
class Timeline:
    """One step's memory; see the head of this file. Nothing comes or goes within a point but temporaries, and each is
    recorded at its fullest.

    Attributes:
        other: at each point the bytes that are no payload: parameters, gradients, temporaries, reconstructions.
        spans: the payloads.
        original: for each site, bytes of the tensors that it was given in the step.
        stored: for each site, bytes of the payloads that it made of them.
    """

    other: tuple[int, ...]
    spans: tuple[Span, ...]
    original: Mapping[str, int]
    stored: Mapping[str, int]

    @cached_property
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same as numbers: other_T, share_TS and sole_TS, float64, the sites in the order of `original`."""
        column = {site: i for i, site in enumerate(self.original)}
        share_ST = torch.zeros(len(column), len(self.other), dtype=torch.float64)
        sole_ST = torch.zeros_like(share_ST)
        for span in self.spans:
            share_ST[column[span.site], span.start : span.stop] += span.share
            if span.sole_holder:
                sole_ST[column[span.site], span.start : span.stop] += span.share
        return torch.tensor(self.other, dtype=torch.float64), share_ST.t(), sole_ST.t()

    def usage(self, bytes_of: Mapping[str, int]) -> Tensor:
        """Bytes allocated at each point, float64 [T], if each site's payloads took `bytes_of[site]` in the step.

        A site that is given its original's bytes, or more, counts as kept as it is; one that is not given keeps what it
        was recorded with.
        """
        other_T, share_TS, sole_TS = self.table
        given = {site: bytes_of.get(site, self.stored[site]) for site in self.original}
        exact = [given[site] >= size for site, size in self.original.items()]
        lossy_S = torch.tensor([0 if e else given[s] for s, e in zip(given, exact, strict=True)], dtype=torch.float64)
        exact_S = torch.tensor([n * e for n, e in zip(self.original.values(), exact, strict=True)], dtype=torch.float64)
        return other_T + share_TS @ lossy_S + sole_TS @ exact_S

    def peak(self, bytes_of: Mapping[str, int]) -> int:
        """The most bytes allocated at any point, with payloads of other sizes; see `usage`. 0 without points."""
        usage_T = self.usage(bytes_of)
        return math.ceil(float(usage_T.max()) - 1e-6) if len(usage_T) else 0
