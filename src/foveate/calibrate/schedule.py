"""Quantize in bounded memory: what to keep, what to compute twice, what to collect in a pass of its own.

Beyond the model itself three things take memory, and each can be traded for time:

    what backward keeps    every layer's activations, or those of one block at a time, run twice (`collect.replay`)
    large statistics       a matrix a weight, for all weights at once or for a share of them in each pass over the data
    finished weights       planes beside the float weights until the end, or in place of them at once

Shares are taken from the end of the model to its beginning. The first pass, the only one that needs gradients where
statistics factor, collects all that is small and the first share; each further one runs the model only as far as its
share goes, so that float weights behind it are no longer needed and can make room. The reference of every statistic is
the float model, whichever weights are on planes already, so the result is that of a single pass.

`plan` chooses, by arithmetic alone, the cheapest of these that fits; `Calibration` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.collect.statistics import TOGETHER

#: Bytes of temporaries that searching grids and scoring take at most.
_TEMPORARIES = 288 << 20
#: Bytes that anything takes: code, small statistics, what allocators keep.
_SLACK = 32 << 20


@dataclass(frozen=True)
class Load:
    """What one weight takes, in bytes, and when it is used.

    Attributes:
        rows, columns: its shape.
        copied: whether its float32 matrix is a copy (another dtype, or another layout).
        floats: of the weight as it is.
        large: of its large statistics.
        gradients: whether these need a backward pass.
        kept: of statistics that are there from the first pass until it is rounded.
        first, last: its first and last place in the order of calls; -1 and the last of all if it was not seen.
    """

    rows: int
    columns: int
    copied: bool
    floats: int
    large: int
    gradients: bool
    first: int
    last: int
    kept: int = 0

    @property
    def planes(self) -> int:
        """Of all planes, scales and padding."""
        return self.rows * (self.columns + -(-self.columns // 32) * 4)

    @property
    def rounding(self) -> int:
        """That rounding takes meanwhile: searching and scoring, factoring in double precision, or choosing codes,
        whichever takes most.

        Choosing holds the metric and its factor, and the errors of each thread's rows twice: what is wanted of them,
        and what is taken from that.
        """
        size, matrix = self.rows * self.columns, 4 * self.columns**2 * bool(self.large)
        errors = 2 * 20 * self.columns * min(self.rows, TOGETHER * torch.get_num_threads()) * bool(self.large)
        choosing = 2 * matrix + 2 * self.kept + 6 * size + errors
        most = max(min(_TEMPORARIES, 28 * size), 8 * matrix, choosing)
        # means of the statistics, and the codes
        return matrix + self.kept + (2 + 4 * self.copied) * size + most


@dataclass(frozen=True)
class Plan:
    """How to go about it.

    Attributes:
        replay: whether blocks are run twice.
        shares: weights by number, those of the first pass first.
        lean: whether float weights make room as soon as they are done with.
        peak: bytes beyond the model that it takes at most, as far as can be told.
    """

    replay: bool
    shares: tuple[tuple[int, ...], ...]
    lean: bool
    peak: int


def plan(loads: Sequence[Load], kept: int, kept_replayed: int, forward: int, room: int) -> Plan:
    """The cheapest way that fits, or the one that takes least if none does.

    Args:
        loads: the weights.
        kept: bytes that backward keeps of a batch.
        kept_replayed: the same when blocks are replayed.
        forward: bytes that a pass without gradients takes.
        room: bytes that there are beyond the model.
    """
    ways: dict[tuple[tuple[tuple[int, ...], ...], bool, bool], Plan] = {}
    for parts in (*range(1, 17), *range(20, 64, 4), max(len(loads), 64)):
        shares = cut(loads, parts)
        for replay in (False, True):
            for lean in (False, True):
                if (shares, replay, lean) not in ways:
                    peak = _peak(loads, shares, kept_replayed if replay else kept, forward, lean)
                    ways[shares, replay, lean] = Plan(replay, shares, lean, peak)
    fitting = [way for way in ways.values() if way.peak <= room]
    if fitting:
        return min(fitting, key=lambda way: _cost(loads, way))
    return min(ways.values(), key=lambda way: way.peak)


def cut(loads: Sequence[Load], parts: int) -> tuple[tuple[int, ...], ...]:
    """Weights by number in shares of about equal bytes, from the last called to the first."""
    total = sum(load.large for load in loads)
    order = sorted(range(len(loads)), key=lambda i: -loads[i].last)
    most = -(-total // parts)
    shares: list[list[int]] = [[]]
    filled = 0
    for i in order:
        large = loads[i].large
        if filled and large and filled + large > most:
            shares.append([])
            filled = 0
        shares[-1].append(i)
        filled += large
    return tuple(map(tuple, shares))


def freed_after(loads: Sequence[Load], shares: Sequence[Sequence[int]], done: int) -> list[int]:
    """The weights, by number, that no pass needs once the first `done` shares are rounded."""
    left = [i for share in shares[done:] for i in share]
    if any(loads[i].gradients for i in left):
        return []  # a backward pass goes through everything
    needed = max((loads[i].last for i in left), default=-2)
    return [i for share in shares[:done] for i in share if loads[i].first > needed]


def _peak(loads: Sequence[Load], shares: Sequence[Sequence[int]], kept: int, forward: int, lean: bool) -> int:
    """Bytes beyond the model, at most, while a plan is carried out."""
    made, peak = sum(load.kept for load in loads), 0
    gone: set[int] = set()
    for number, share in enumerate(shares):
        large = sum(loads[i].large for i in share)
        backward = number == 0 or any(loads[i].gradients for i in share)
        peak = max(peak, made + large + (kept if backward else forward))
        at_once = lean and number == len(shares) - 1
        for i in share:
            peak = max(peak, made + large + loads[i].rounding)
            made += loads[i].planes - (loads[i].floats if at_once else 0)
            large -= loads[i].large
            gone |= {i} if at_once else set()
        if lean:
            more = set(freed_after(loads, shares, number + 1)) - gone
            made -= sum(loads[i].floats for i in more)
            gone |= more
    # planes are gathered in blocks at the end, when no float weight is needed any more
    made -= sum(load.floats for i, load in enumerate(loads) if i not in gone)
    return _SLACK + max(peak, made + sum(load.planes for load in loads))


@dataclass(frozen=True)
class Further:
    """What the passes after the first one take.

    Attributes:
        whole: passes with gradients.
        forward: passes without, as far as each of them goes, with what its statistics take beside the model.
    """

    whole: int
    forward: float


def further_passes(loads: Sequence[Load], way: Plan) -> Further:
    """The passes after the first one."""
    total = max((load.last for load in loads), default=0) + 1
    whole, forward = 0, 0.0
    for share in way.shares[1:]:
        if any(loads[i].gradients for i in share):
            whole += 1
        else:
            forward += 1.2 * (max(loads[i].last for i in share) + 1) / total
    return Further(whole, forward)


def _cost(loads: Sequence[Load], way: Plan) -> float:
    """Time, in forward passes: one with gradients and statistics takes about five."""
    further = further_passes(loads, way)
    # what can be undone is kept if it may be
    return (1 + further.whole) * (5.0 + way.replay) + further.forward + 0.01 * way.lean
