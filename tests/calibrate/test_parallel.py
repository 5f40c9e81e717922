"""Weights that are rounded at the same time: their order, errors, and the threads that they share."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

import foveate as fv
from foveate.calibrate.parallel import in_parallel, workers_for
from tiny import llama, tokens


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items() -> None:
    used = set()

    def work(number: int) -> int:
        used.add(torch.get_num_threads())
        return number * number

    assert list(in_parallel(work, range(9))) == [(n, n * n) for n in range(9)]
    assert used == {1}
    assert torch.get_num_threads() == 3
    assert list(in_parallel(work, [4])) == [(4, 16)]
    assert used == {1, 3}  # one weight alone has all threads


def test_as_many_work_as_there_are_workers() -> None:
    together = threading.Barrier(3, timeout=20)
    assert workers_for(6) == 3
    assert [n for n, _ in in_parallel(lambda _: together.wait(), range(6))] == list(range(6))


def test_nothing_begins_after_an_error() -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("one")
        return number

    results = in_parallel(work, range(100))
    assert next(results) == (0, 0)
    with pytest.raises(ValueError, match="one"):
        next(results)
    assert max(begun) <= 4
    assert torch.get_num_threads() == 3


def test_leaving_early_awaits_what_has_begun() -> None:
    begun: list[int] = []
    for number, _ in itertools.islice(in_parallel(begun.append, range(100)), 2):
        assert number < 2
    assert len(begun) < 10


def test_a_model_is_the_same_with_any_number_of_workers() -> None:
    profiles = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        model = llama()
        profiles.append((fv.quantize(model, tokens(), progress=False), model))
    one, three = (profile.losses for profile, _ in profiles)
    for name, losses in one.items():
        # sums of the passes may be added in another order
        assert torch.allclose(losses, three[name], rtol=0.05, atol=1e-7), name
