from __future__ import annotations

import math

import pytest

from foveate.activations.report import SavedReport, SavedRow
from foveate.report.saved import bytes_by_layer, saved_plot
from report.test_page import Checked


def row(site: str, form: str, bits: int, before: int, after: int) -> SavedRow:
    return SavedRow(site, "linear", form, bits, before, after, math.nan)


ROWS = (
    row("model.layers.0.<up>:saved.linear.0.0", "grouped", 4, 80_000, 10_000),
    row("model.layers.0:saved.relu.0.0", "masked", 1, 32_000, 1000),
    row("model.layers.1.up:saved.linear.0.0", "grouped", 2, 80_000, 5000),
    row("model.layers.1.up:saved.linear.1.0", "grouped", 16, 80_000, 40_000),
    row("head:saved.linear.0.0", "exact", 32, 4000, 4000),
    row("outside:saved.div.0.0", "exact", 32, 4, 4),
)
REPORT = SavedReport(3, ROWS, 250_000, 60_004, 0.1, ())


def test_bytes_are_those_of_the_rows() -> None:
    layers = bytes_by_layer(REPORT)
    assert list(layers) == ["model.layers.0", "model.layers.1", "head", "outside"]
    assert layers["model.layers.0"] == (112_000, {"2": 0, "4": 10_000, "8": 0, "16": 0, "lossless": 1000})
    assert layers["model.layers.1"] == (160_000, {"2": 5000, "4": 0, "8": 0, "16": 40_000, "lossless": 0})
    assert sum(sum(after.values()) for _, after in layers.values()) == sum(r.bytes_after for r in ROWS)


def test_the_plot_is_one_well_formed_file() -> None:
    checked = Checked(saved_plot(REPORT))
    assert checked.tags.count("g") == 3  # the last keeps next to nothing
    assert {"model.layers.0", "109.38 KiB → 10.74 KiB", "244.14 KiB → 58.60 KiB, 4.2x less"} <= set(checked.text)
    assert ("xmlns", "http://www.w3.org/2000/svg") in checked.attributes


def test_bars_are_as_long_as_their_bytes() -> None:
    checked = Checked(saved_plot(REPORT))
    widths = []
    for i, (name, value) in enumerate(checked.attributes):
        if (name, value) == ("class", "before"):
            widths.append(float(dict(checked.attributes[i : i + 5])["width"] or "nan"))
    assert len(widths) == 3
    assert [w / widths[1] for w in widths] == pytest.approx([112 / 160, 1, 4 / 160], abs=1e-3)


def test_long_names_are_cut_and_kept_in_the_tip() -> None:
    name = "a" * 50
    drawn = saved_plot(SavedReport(0, (row(f"{name}:saved.mul.0.0", "exact", 32, 4, 4),), 4, 4, None, ()))
    assert f"<title>{name}: 4 B → 4 B</title>" in drawn
    assert f">…{'a' * 31}</text>" in drawn


def test_nothing_to_draw() -> None:
    empty = Checked(saved_plot(SavedReport(0, (), 0, 0, None, ())))
    assert empty.tags.count("g") == 0
    assert "0 B → 0 B, 1.0x less" in empty.text
