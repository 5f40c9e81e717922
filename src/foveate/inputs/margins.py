"""Which two maps a cascade reads, and where the margin is thin: a search over what samples gave at some maps.

A sample is read at the lower map first. Where its margin, the distance between its two greatest logits, is below a
threshold, it is read again at the higher map. For a pair of maps the fewest samples are found that must be read again,
the thinnest margins first, so that enough samples are decided as the reference decides them. Both readings count.

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
    """The agreement that so many samples must show: one standard error more than what is asked of further ones."""
    return min(agreement + math.sqrt(agreement * (1 - agreement) / max(samples, 1)), 1.0)


def static_plan(right_mn: Tensor, bits: Sequence[float], agreement: float) -> Plan | None:
    """The map of the fewest bits that alone shows the agreement on every second sample; None if none does."""
    right_mk = right_mn[:, 1::2] if right_mn.shape[1] > 1 else right_mn
    k = right_mk.shape[1]
    shown = [int(right.sum()) / k for right in right_mk]
    found = [i for i, value in enumerate(shown) if value >= wanted(agreement, k)]
    if not found:
        return None
    best = min(found, key=lambda i: bits[i])
    return Plan(low=best, high=best, threshold=-math.inf, share=0.0, bits=bits[best], agreement=shown[best])


def cascade_plan(right_mn: Tensor, margins_mn: Tensor, bits: Sequence[float], agreement: float) -> Plan | None:
    """The two maps of the fewest bits, and the threshold at which they show the agreement; None if no pair does.

    The cheapest of many pairs is one that was lucky on the samples that chose it. So pairs are put in order by the even
    samples, and the threshold of the first that can is set on the odd ones.

    Args:
        right_mn: bool, whether each map decides each sample as the reference does.
        margins_mn: float32, the margins at each map.
        bits: of each map.
        agreement: the part of further samples to be decided as by the reference, 0 to 1.
    """
    n = right_mn.shape[1]
    first, second = (slice(0, None, 2), slice(1, None, 2)) if n > 1 else (slice(None), slice(None))
    pairs = [(low, high) for low in range(len(bits)) for high in range(len(bits)) if bits[high] > bits[low]]

    def planned(which: slice, pair: tuple[int, int], need: float) -> Plan | None:
        low, high = pair
        return threshold_plan(
            right_mn[low, which], right_mn[high, which], margins_mn[low, which], (low, high), bits, need
        )

    by_bits = [(found.bits, pair) for pair in pairs if (found := planned(first, pair, agreement)) is not None]
    need = wanted(agreement, right_mn[:, second].shape[1])
    for _, pair in sorted(by_bits):
        found = planned(second, pair, need)
        if found is not None:
            return found
    return None


def threshold_plan(
    right_low_n: Tensor,
    right_high_n: Tensor,
    margins_n: Tensor,
    pair: tuple[int, int],
    bits: Sequence[float],
    need: float,
) -> Plan | None:
    """The least threshold at which two maps show an agreement on these samples; None if none does.

    Args:
        right_low_n, right_high_n: bool, whether each of the two decides as the reference does.
        margins_n: float32, the margins at the lower one.
        pair: the numbers of the two maps.
        bits: of each map.
        need: the agreement.
    """
    n = len(margins_n)
    order_n = margins_n.argsort(stable=True)
    sorted_n, kept_n = margins_n[order_n], right_low_n[order_n].long()
    # right where the first k samples are read again, for k from 0 to n
    right_k = torch.cat([kept_n.new_zeros(1), (right_high_n[order_n].long() - kept_n).cumsum(0)]) + kept_n.sum()
    # samples of one margin are read again together
    ends_k = torch.ones(n + 1, dtype=torch.bool)
    ends_k[1:n] = sorted_n[1:] > sorted_n[:-1]
    enough = ((right_k >= math.ceil(need * n - 1e-9)) & ends_k).nonzero()
    if not len(enough):
        return None
    k, (low, high) = int(enough[0]), pair
    return Plan(
        low=low,
        high=high,
        threshold=_between(sorted_n, k),
        share=k / n,
        bits=bits[low] + k / n * bits[high],
        agreement=int(right_k[k]) / n,
    )


def _between(sorted_n: Tensor, k: int) -> float:
    """A threshold above the first k margins, and not above the next."""
    if k == 0:
        return -math.inf
    if k == len(sorted_n):
        return math.inf
    low, high = float(sorted_n[k - 1]), float(sorted_n[k])
    middle = (low + high) / 2
    return middle if low < middle <= high else high
