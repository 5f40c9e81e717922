from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from foveate.cli.shared.tables import legend, level_bar, map_table, sizes_table
from foveate.precision.maps import PrecisionMap, Site

SITES = tuple(Site(f"[red]{i}[/].0.w:weight", "weight", 32, 64, 32, rows_read=32) for i in range(2))


@pytest.mark.parametrize("width", [1, 7, 32])
@pytest.mark.parametrize(
    "found", [{8: 1.0}, {8: 0.5, 2: 0.5}, {0: 1 / 3, 3: 1 / 3, 6: 1 / 3}, {8: 0.999, 2: 0.001}, {4: 1 / 7, 2: 6 / 7}]
)
def test_a_bar_is_as_wide_as_asked_and_in_order(found: dict[int, float], width: int) -> None:
    text = level_bar(found, width).plain
    assert len(text) == width
    assert list(text) == sorted(text, reverse=True)
    for level, share in found.items():
        assert abs(text.count(str(level)) - share * width) < 1


def test_tables_show_names_as_they_are() -> None:
    plan = PrecisionMap(SITES, {SITES[0].name: 8, SITES[1].name: bytes([4, 4, 2, 0])}, 100)
    console = Console(width=120, record=True, file=StringIO())
    for thing in (map_table(plan), map_table(plan, each_site=True), legend(plan), sizes_table(plan, 9999)):
        console.print(thing)
    text = console.export_text()
    assert "[red]0[/].0 " in text
    assert "[red]1[/].0.w" in text
    assert "88888888888888888888888888888888" in text
    assert "44444444444444442222222200000000" in text
    assert "dropped 12%" in text
    assert "9.76 KiB" in text
