"""Memory of a reservation: runs that come together share huge pages, and what leaves is given back all the same."""

from __future__ import annotations

import pytest

from foveate.memory.arena import HUGE_PAGE
from foveate.memory.reservation import Reservation, Slot

_QUARTER = HUGE_PAGE // 4


def _slots(count: int, begin: int = 0) -> list[Slot]:
    return [Slot(begin=begin + n * _QUARTER, pages=_QUARTER, lead=0) for n in range(count)]


@pytest.mark.parametrize(
    ("first", "last", "huge"),
    [(0, 8, 2), (0, 7, 1), (1, 8, 1), (1, 7, 0), (3, 5, 0), (4, 8, 1), (0, 0, 0)],
)
def test_huge_pages_are_those_that_come_whole(first: int, last: int, huge: int) -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    assert memory.coming(slots[first:last]) == huge * HUGE_PAGE


def test_gaps_are_not_bridged() -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    assert memory.coming([*slots[:2], *slots[3:8]]) == HUGE_PAGE
    assert memory.coming(slots[7:3:-1]) == HUGE_PAGE  # in any order


def test_what_leaves_is_given_back_from_huge_pages_too() -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    memory.coming(slots[:8])
    for slot in slots[:8]:
        memory.slot(slot)[:] = bytes([7]) * slot.pages
    assert memory.resident() == 2 * HUGE_PAGE
    memory.give_back([slots[1], slots[6]])
    assert memory.resident() == 2 * HUGE_PAGE - 2 * _QUARTER
    for number, slot in enumerate(slots[:8]):
        assert set(memory.slot(slot)) == ({0} if number in (1, 6) else {7})
    memory.give_back(slots[:8])
    assert memory.resident() == 0


def test_a_run_that_does_not_come_after_all_is_given_back() -> None:
    memory, slots = Reservation(2 * HUGE_PAGE), _slots(8)
    memory.coming(slots[:4])
    memory.slot(slots[0])[:] = bytes([7]) * _QUARTER  # the whole huge page is resident now, where there are any
    memory.give_back(slots[1:4])
    assert memory.resident() == _QUARTER
    assert set(memory.slot(slots[0])) == {7}


def test_what_always_stays_keeps_its_huge_pages() -> None:
    memory, slots = Reservation(4 * HUGE_PAGE, always=HUGE_PAGE + _QUARTER), _slots(16)
    memory.slot(slots[0])[:] = bytes([7]) * _QUARTER
    memory.give_back(slots[4:16])
    assert set(memory.slot(slots[0])) == {7}
