"""The schedule of a calibration: how quantizing fits into the memory there is.

Beside the model itself three things take memory, and each can be exchanged for time:

    what backward keeps    the activations of every layer, or of one block at a time that runs twice (`collect.replay`)
    large statistics       a matrix for each weight: for all weights at once, or for one part of them in each pass
    float weights          kept beside the planes until the end, or freed as soon as their planes are made

The weights are cut into parts, from the end of the model to its beginning. The first pass over the data collects all
small statistics, and the large ones of the first part. Each further pass collects the large statistics of one part.
Where statistics factor (`foveate.collect.statistics`) a further pass needs no gradients, and runs the model no further
than its part. So the float weights behind the part are no longer needed and can be freed. Every statistic is taken from
the float model, whichever weights are on planes already, so the result is that of a single pass.

`make_schedule` chooses the fastest schedule that fits, by arithmetic alone; `foveate.calibrate.passes` carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.calibrate.parallel import workers_for
from foveate.collect.statistics import block_rows

#: The most bytes of temporaries that the search for grids and the scoring take.
_TEMPORARIES = 288 << 20
#: A schedule that takes less memory may take so many times as long as the fastest.
_WORTH_MEMORY = 1.35
#: Bytes that every schedule takes: code, small statistics, and what allocators keep.
_SLACK = 64 << 20


@dataclass(frozen=True)
class WeightCost:
    """The bytes that one weight takes, and when the weight is used.

    Attributes:
        rows, columns: the shape of the weight.
        copied: whether the float32 matrix is a copy (the weight has another dtype, or another layout).
        float_bytes: bytes of the float weight.
        large_bytes: bytes of the large statistics.
        gradients: whether the large statistics need a backward pass.
        first_call, last_call: first and last place of the weight in the order of calls. They are -1 and the number of
            calls if the weight was not seen.
        kept_bytes: bytes of the statistics that are kept from the first pass until the weight is rounded.
    """

    rows: int
    columns: int
    copied: bool
    float_bytes: int
    large_bytes: int
    gradients: bool
    first_call: int
    last_call: int
    kept_bytes: int = 0

    @property
    def joint_rows(self) -> int:
        """How many rows are chosen jointly with each other; 0 where each is chosen by itself."""
        return block_rows(self.rows) if self.kept_bytes else 0

    @property
    def plane_bytes(self) -> int:
        """Bytes of all planes, scales and padding."""
        return self.rows * (self.columns + -(-self.columns // 32) * 4)

    @property
    def rounding_bytes(self) -> int:
        """Bytes that rounding takes for the time it runs.

        Three steps follow each other, and the largest counts: the search for grids with the scoring, the factoring in
        double precision, and the choice of codes. The choice of codes holds the metric and its factor, and twice the
        errors of the rows of each thread: the wanted errors, and the product that is subtracted from them.
        """
        size, matrix = self.rows * self.columns, 4 * self.columns**2 * bool(self.large_bytes)
        together = min(self.rows, max(self.joint_rows, 1) * torch.get_num_threads())
        errors = 2 * 20 * self.columns * together * bool(self.large_bytes)
        choosing = 2 * matrix + 2 * self.kept_bytes + 6 * size + errors
        most = max(min(_TEMPORARIES, 28 * size), 8 * matrix, choosing)
        # the means of the statistics, and the codes
        return matrix + self.kept_bytes + (2 + 4 * self.copied) * size + most


@dataclass(frozen=True)
class Schedule:
    """How a calibration is carried out.

    Attributes:
        replay: whether blocks are run twice.
        parts: the weights, by number, whose large statistics each pass collects; those of the first pass come first.
        free_early: whether float weights are freed as soon as they are not needed any more.
        peak: the predicted most bytes that the calibration takes beside the model.
    """

    replay: bool
    parts: tuple[tuple[int, ...], ...]
    free_early: bool
    peak: int


def make_schedule(
    costs: Sequence[WeightCost], kept: int, kept_replayed: int, forward: int, room: int, comfort: int | None = None
) -> Schedule:
    """The fastest schedule that fits into memory, or the one that takes the least memory if none fits.

    Args:
        costs: what each weight takes.
        kept: bytes that backward keeps of a batch.
        kept_replayed: bytes that backward keeps when blocks are replayed.
        forward: bytes that a pass without gradients takes.
        room: bytes that are free beside the model.
        comfort: bytes that calibration should leave it at where that takes little more time, or come as near to as that
            time allows, as on a machine that does other things too; no such bound if not given.
    """
    candidates: dict[tuple[tuple[tuple[int, ...], ...], bool, bool], Schedule] = {}
    for count in (*range(1, 17), *range(20, 64, 4), max(len(costs), 64)):
        parts = cut(costs, count)
        for replay in (False, True):
            for free_early in (False, True):
                if (parts, replay, free_early) not in candidates:
                    peak = _peak(costs, parts, kept_replayed if replay else kept, forward, free_early)
                    candidates[parts, replay, free_early] = Schedule(replay, parts, free_early, peak)
    fitting = [schedule for schedule in candidates.values() if schedule.peak <= room]
    if fitting:
        fastest = min(_relative_time(costs, schedule) for schedule in fitting)
        if comfort is not None:
            # float weights are kept, so that the model is what it was after an interruption
            kept_weights = [s for s in fitting if not s.free_early]
            bearable = [s for s in kept_weights if _relative_time(costs, s) <= _WORTH_MEMORY * fastest]
            modest = [s for s in bearable if s.peak <= comfort]
            if bearable and not modest:
                return min(bearable, key=lambda schedule: schedule.peak)
            fitting = modest or fitting
        return min(fitting, key=lambda schedule: _relative_time(costs, schedule))
    return min(candidates.values(), key=lambda schedule: schedule.peak)


def cut(costs: Sequence[WeightCost], count: int) -> tuple[tuple[int, ...], ...]:
    """Cut the weights, by number, into parts of about equal bytes, from the last called to the first."""
    total = sum(cost.large_bytes for cost in costs)
    order = sorted(range(len(costs)), key=lambda i: -costs[i].last_call)
    most = -(-total // count)
    parts: list[list[int]] = [[]]
    filled = 0
    for i in order:
        large = costs[i].large_bytes
        if filled and large and filled + large > most:
            parts.append([])
            filled = 0
        parts[-1].append(i)
        filled += large
    # the largest first: the last ones to be rounded are then done at about the same time
    return tuple(tuple(sorted(part, key=lambda i: -costs[i].rows * costs[i].columns)) for part in parts)


def freed_after(costs: Sequence[WeightCost], parts: Sequence[Sequence[int]], done: int) -> list[int]:
    """The weights, by number, that no further pass needs after the first `done` parts are rounded."""
    left = [i for part in parts[done:] for i in part]
    if any(costs[i].gradients for i in left):
        return []  # a backward pass goes through all layers
    needed = max((costs[i].last_call for i in left), default=-2)
    return [i for part in parts[:done] for i in part if costs[i].first_call > needed]


def _peak(
    costs: Sequence[WeightCost], parts: Sequence[Sequence[int]], kept: int, forward: int, free_early: bool
) -> int:
    """The most bytes beside the model that a schedule takes."""
    held, peak = sum(cost.kept_bytes for cost in costs), 0
    freed: set[int] = set()
    for number, part in enumerate(parts):
        large = sum(costs[i].large_bytes for i in part)
        backward = number == 0 or any(costs[i].gradients for i in part)
        peak = max(peak, held + large + (kept if backward else forward))
        at_once = free_early and number == len(parts) - 1
        for place, i in enumerate(part):
            at_once_bytes = sum(costs[j].rounding_bytes for j in part[place : place + workers_for(len(part))])
            peak = max(peak, held + large + at_once_bytes)
            held += costs[i].plane_bytes - (costs[i].float_bytes if at_once else 0)
            large -= costs[i].large_bytes
            freed |= {i} if at_once else set()
        if free_early:
            more = set(freed_after(costs, parts, number + 1)) - freed
            held -= sum(costs[i].float_bytes for i in more)
            freed |= more
    # planes are gathered in blocks at the end, when no float weight is needed any more
    held -= sum(cost.float_bytes for i, cost in enumerate(costs) if i not in freed)
    return _SLACK + max(peak, held + sum(cost.plane_bytes for cost in costs))


@dataclass(frozen=True)
class FurtherPasses:
    """The work of all passes after the first one.

    Attributes:
        with_gradients: how many passes need gradients.
        forward_only: the passes without gradients, in forward passes through the whole model. Each counts by how far
            it goes, and a fifth more for its statistics.
    """

    with_gradients: int
    forward_only: float


def further_passes(costs: Sequence[WeightCost], schedule: Schedule) -> FurtherPasses:
    """The work of the passes after the first one."""
    total = max((cost.last_call for cost in costs), default=0) + 1
    with_gradients, forward = 0, 0.0
    for part in schedule.parts[1:]:
        if any(costs[i].gradients for i in part):
            with_gradients += 1
        else:
            forward += 1.2 * (max(costs[i].last_call for i in part) + 1) / total
    return FurtherPasses(with_gradients, forward)


def _relative_time(costs: Sequence[WeightCost], schedule: Schedule) -> float:
    """The time that a schedule takes, in forward passes. A pass with gradients and statistics counts as five."""
    further = further_passes(costs, schedule)
    # a model with its float weights can be restored after an error, so they are kept where memory allows it
    return (1 + further.with_gradients) * (5.0 + schedule.replay) + further.forward_only + 0.01 * schedule.free_early
