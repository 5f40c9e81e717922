"""Which two maps a cascade reads, and where the margin is thin: a search over what samples gave at some maps.

A sample is read at the lower map first. Where its margin, the distance between its two greatest logits, is below a
threshold, it is read again at the higher map. For each pair of maps the fewest samples are found that must be read
again, the thinnest margins first, so that enough samples are decided as the reference decides them. The pair of the
fewest bits wins. Both readings count.

Legend: m maps, the best first; n samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How samples are read.

    Attributes:
        low, high: the numbers of the two maps; the same where one map decides alone.
        threshold: the margin below which a sample is read again.
        share: the part of the samples that are.
        bits: bits of a weight that a sample reads on average, both readings counted.
        agreement: the part that is decided as by the reference.
    """

    low: int
    high: int
    threshold: float
    share: float
    bits: float
    agreement: float


def margins(logits_nC: Tensor) -> Tensor:
    """The distance between the two greatest logits of each sample, [n]; raises `BudgetError` for less than two."""
    if logits_nC.dim() != 2 or logits_nC.shape[1] < 2:
        raise BudgetError(
            f"logits of shape {list(logits_nC.shape)} are not of classes: a cascade needs [n, C], C from 2 on"
        )
    best_n2 = logits_nC.float().topk(2, dim=1).values
    return best_n2[:, 0] - best_n2[:, 1]


def wanted(agreement: float, samples: int) -> float:
    """The agreement that so many samples must show: two standard errors more than what is asked of further ones."""
    return min(agreement + 2 * math.sqrt(agreement * (1 - agreement) / max(samples, 1)), 1.0)


def static_plan(right_mn: Tensor, bits: Sequence[float], agreement: float) -> Plan | None:
    """The map of the fewest bits that alone shows the agreement; None if none does."""
    n = right_mn.shape[1]
    shown = [int(right.sum()) / n for right in right_mn]
    found = [i for i, value in enumerate(shown) if value >= wanted(agreement, n)]
    if not found:
        return None
    best = min(found, key=lambda i: bits[i])
    return Plan(low=best, high=best, threshold=-math.inf, share=0.0, bits=bits[best], agreement=shown[best])


def cascade_plan(right_mn: Tensor, margins_mn: Tensor, bits: Sequence[float], agreement: float) -> Plan | None:
    """The two maps and the threshold of the fewest bits that show the agreement; None if no pair does.

    Args:
        right_mn: bool, whether each map decides each sample as the reference does.
        margins_mn: float32, the margins at each map.
        bits: of each map.
        agreement: the part of further samples to be decided as by the reference, 0 to 1.
    """
    n = right_mn.shape[1]
    need = math.ceil(wanted(agreement, n) * n - 1e-9)
    best: Plan | None = None
    for low in range(len(bits)):
        order_n = margins_mn[low].argsort(stable=True)
        sorted_n = margins_mn[low][order_n]
        kept_n = right_mn[low][order_n].long()
        for high in range(len(bits)):
            if bits[high] <= bits[low]:
                continue
            gained_n = right_mn[high][order_n].long() - kept_n
            # right where the first k samples are read again, for k from 0 to n
            right_k = torch.cat([gained_n.new_zeros(1), gained_n.cumsum(0)]) + kept_n.sum()
            # samples of one margin are read again together
            ends_k = torch.cat([sorted_n.new_ones(1) > 0, sorted_n[1:] > sorted_n[:-1], sorted_n.new_ones(1) > 0])
            enough = ((right_k >= need) & ends_k).nonzero()
            if not len(enough):
                continue
            k = int(enough[0])
            total = bits[low] + k / n * bits[high]
            if best is None or total < best.bits:
                threshold = _between(sorted_n, k)
                best = Plan(
                    low=low, high=high, threshold=threshold, share=k / n, bits=total, agreement=int(right_k[k]) / n
                )
    return best


def _between(sorted_n: Tensor, k: int) -> float:
    """A threshold above the first k margins, and not above the next."""
    if k == 0:
        return -math.inf
    if k == len(sorted_n):
        return math.inf
    low, high = float(sorted_n[k - 1]), float(sorted_n[k])
    middle = (low + high) / 2
    return middle if low < middle <= high else high
