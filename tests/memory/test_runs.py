"""Planes are cut into runs, and runs get pages of their own."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.memory.reservation import PAGE, Reservation, Slot, lay_out
from foveate.memory.runs import Run, Tag, first_strips


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_runs_have_at_least_the_bytes_asked_for(sizes: list[int], least: int) -> None:
    cuts = first_strips(sizes, least)
    assert cuts[0] == 0
    assert list(cuts) == sorted(set(cuts))
    parts = [sum(sizes[a:b]) for a, b in zip(cuts, (*cuts[1:], len(sizes)), strict=True)]
    assert sum(parts) == sum(sizes)
    assert len(parts) == 1 or min(parts) >= least
    # and not much more: a run ends with the strip that made it long enough, but for the last one
    assert all(part < least + max(sizes) for part in parts[:-1])


def test_a_run_says_what_is_wrong_with_it() -> None:
    with pytest.raises(FoveateError, match=r"level \(=5\) of a run is not one of 2, 3, 4, 6, 8"):
        Tag(level=5)
    with pytest.raises(FoveateError, match="is not a share"):
        Tag(level=2, sparsity=1.5)
    with pytest.raises(FoveateError, match=r"plane \(=5\)"):
        _run(plane=5)
    with pytest.raises(FoveateError, match="is empty"):
        _run(size=0)
    with pytest.raises(FoveateError, match="not positive"):
        first_strips([1], 0)
    assert math.isnan(Tag(level=2).importance)


def _run(weight: str = "w", plane: int = 0, first: int = 0, offset: int = 0, size: int = 64) -> Run:
    tag = Tag(level=(2, 3, 4, 6, 8)[min(plane, 4)])
    return Run(weight=weight, plane=plane, first=first, last=first + 1, offset=offset, size=size, checksum="", tag=tag)


@st.composite
def _planes(draw: st.DrawFn) -> tuple[list[Run], dict[tuple[str, int], int]]:
    runs, units = [], {}
    for weight in "ab":
        for plane in range(draw(st.integers(1, 5))):
            unit = draw(st.sampled_from([64, 128, 256, 512]))
            units[(weight, plane)] = unit
            offset = draw(st.integers(0, 5000))
            for first in range(draw(st.integers(1, 4))):
                size = unit * draw(st.integers(1, 40))
                runs.append(_run(weight, plane, first, offset, size))
                offset += size
    return runs, units


@given(_planes())
def test_every_run_has_whole_pages_at_the_place_that_its_file_has(
    given_planes: tuple[list[Run], dict[tuple[str, int], int]],
) -> None:
    runs, units = given_planes
    layout = lay_out(runs, units)
    spans = sorted((slot.begin, slot.begin + slot.pages) for slot in layout.slots)
    assert all(begin % PAGE == 0 and end % PAGE == 0 for begin, end in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] == layout.total
    for run, slot in zip(runs, layout.slots, strict=True):
        key = (run.weight, run.plane)
        unit = units[key]
        begin = slot.begin + slot.lead
        assert slot.lead + run.size <= slot.pages < slot.lead + run.size + PAGE
        # a kernel finds it at a whole number of tiles from the beginning of the plane
        assert begin - layout.begins[key] == layout.starts[key][run.first] >= 0
        assert layout.starts[key][run.first] % unit == 0
        assert begin + run.size <= layout.ends[key]
        assert (layout.ends[key] - layout.begins[key]) % unit == 0
        if runs[[r.weight + str(r.plane) for r in runs].index(run.weight + str(run.plane))].offset % 64 == 0:
            assert slot.lead == run.offset % PAGE  # so that O_DIRECT can be used


def test_memory_that_is_given_back_is_not_resident() -> None:
    block = Reservation(64 * PAGE)
    assert block.resident() == 0
    block.whole[: 40 * PAGE] = 7
    assert block.resident() == 40 * PAGE
    slots = [Slot(begin=PAGE * n, pages=PAGE, lead=0) for n in (3, 4, 9)]
    assert block.give_back(slots) == 3 * PAGE
    assert block.resident() == 37 * PAGE
    assert int(block.whole[3 * PAGE : 5 * PAGE].sum()) == 0
    assert int(block.whole[5 * PAGE : 9 * PAGE].sum()) == 7 * 4 * PAGE
    with pytest.raises(FoveateError, match="not a multiple of the bytes of a tile"):
        lay_out([_run()], {("w", 0): 96})
