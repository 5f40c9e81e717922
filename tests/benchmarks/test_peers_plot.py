from __future__ import annotations

import itertools

import pytest

from benchmarks.peers.speed.plot import Product, products, speed_plot
from foveate.errors import FoveateError
from report.test_page import Checked


def turn(form: str, bits: int, seconds: float, *, bandwidth: float = 100.0, rows: int = 1) -> dict[str, object]:
    return {
        "form": form, "bits": bits, "bytes": 10 * bits, "rows": rows, "seconds": seconds, "bandwidth": bandwidth
    }  # fmt: skip


OURS = [turn(f"foveate {level}", level, level / 9) for level in (2, 3, 4, 6, 8)]


def test_times_are_in_units_of_what_the_memory_needs_at_8_bits() -> None:
    turns = [*OURS, turn("peer <4>", 4, 1.0), turn("peer <4>", 4, 3.0, bandwidth=50.0), turn("peer <4>", 4, 0.6)]
    found = {p.name: p for p in products(turns)}
    assert found["foveate 8"].time == pytest.approx(8 / 9 * 100 / 80)
    # the middle one of 100, 150 and 60 bytes in the time of the product, over the 80 of our weight
    assert found["peer <4>"] == Product("peer <4>", 4, pytest.approx(100 / 80), 0.5)


def test_other_numbers_of_rows_are_left_out() -> None:
    found = products([*OURS, turn("peer", 4, 1.0, rows=16)])
    assert len(found) == len(OURS)
    with pytest.raises(FoveateError, match="no product of foveate 8 with 16 rows"):
        products(OURS, rows=16)


def test_the_plot_is_one_well_formed_file() -> None:
    turns = [*OURS, turn("peer <4>", 4, 1.0), turn("another 4", 4, 1.01), turn("torch bfloat16", 16, 2.0)]
    drawn = speed_plot(turns)
    checked = Checked(drawn)
    assert checked.tags.count("circle") == len(OURS)
    assert checked.tags.count("rect") == 2
    assert {"peer <4>", "another 4", "torch bfloat16", "foveate", "what the memory needs"} <= set(checked.text)
    assert ("xmlns", "http://www.w3.org/2000/svg") in checked.attributes


def test_names_in_a_column_do_not_lie_over_each_other() -> None:
    turns = [*OURS, *(turn(f"peer {i}", 4, 1.0 + i / 1000) for i in range(5))]
    checked = Checked(speed_plot(turns))
    heights = []
    for i, (name, value) in enumerate(checked.attributes):
        if (name, value) == ("class", "peer-name"):
            heights.append(float(dict(checked.attributes[i : i + 3])["y"] or "nan"))
    assert len(heights) == 5
    assert all(above - below >= 14 for above, below in itertools.pairwise(heights))
