"""Round some weights at the same time, each on its own threads.

Rounding one weight is a chain of steps, and not every step has work for all cores: a projection of 192 rows is a single
block of rows that are chosen jointly. So the cores are shared among a few weights instead. A weight is computed on the
threads of one worker only, so its result does not depend on which others are rounded beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from foveate.collect.kinds import QuantizableWeight, weight_matrix_shape
from foveate.kernels.threads import threads

Item = TypeVar("Item")
Result = TypeVar("Result")
#: The most weights at a time: each takes memory of its own.
_MOST = 4


def workers_for(items: int) -> int:
    """How many weights are rounded at the same time."""
    return max(1, min(_MOST, torch.get_num_threads(), items))


def in_parallel(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, in the order of the items.

    No more items are begun than there are workers, beyond those whose results were taken. After an error, or where the
    iteration is left, what has begun is awaited and nothing else is begun.

    Args:
        work: is called on the threads of a pool, and spends its time in torch.
        items: what to work on.
    """
    count = workers_for(len(items))
    if count == 1:
        yield from ((item, work(item)) for item in items)
        return
    with threads(torch.get_num_threads() // count), ThreadPoolExecutor(count) as pool:
        begun: list[tuple[Item, Future[Result]]] = []
        try:
            for item in items:
                begun.append((item, pool.submit(work, item)))
                if len(begun) == count:
                    first, future = begun.pop(0)
                    yield first, future.result()
            while begun:
                first, future = begun.pop(0)
                yield first, future.result()
        finally:
            for _, future in begun:
                future.cancel()


def weight_work(entry: QuantizableWeight) -> int:
    """About how much work rounding a weight is, in any unit: codes, each with a row of the covariance."""
    rows, columns = weight_matrix_shape(entry.modules[0])
    return rows * columns * (columns + 1000)
