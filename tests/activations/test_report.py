"""The report on what a store keeps: its numbers, and how it reads."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import foveate as fv
from foveate.activations.report import SavedAudit, SavedReport, SavedRow


def row(site: str, form: str, bits: int, before: int, after: int, error: float) -> SavedRow:
    return SavedRow(site, site.rpartition(".")[2], form, bits, before, after, error)


ROWS = (
    row("layers.0.up:saved.linear", "grouped", 4, 8000, 1000, 0.03),
    row("layers.1.up:saved.linear", "grouped", 2, 8000, 500, 0.04),
    row("layers.0:saved.relu", "masked", 1, 32_000, 1000, 0.0),
    row("head:saved.gelu", "grouped", 8, 4000, 1000, math.nan),
)
AUDITS = (SavedAudit(3, math.nan, 0.02), SavedAudit(6, 0.05, 0.04), SavedAudit(9, 0.05, 0.07))
REPORT = SavedReport(9, ROWS, 50_000, 3500, 0.06, AUDITS)


def test_errors_add_up_in_squares() -> None:
    assert REPORT.predicted == pytest.approx(0.05)
    assert REPORT.share(ROWS[:1]) == pytest.approx(0.36)
    assert REPORT.share(ROWS) == pytest.approx(1)
    assert REPORT.unmeasured == ("head:saved.gelu",)
    assert REPORT.ratio == pytest.approx(50 / 3.5)
    assert REPORT.bound_held == pytest.approx(2 / 3)


def test_it_reads_as_a_table_of_families() -> None:
    lines = str(REPORT).splitlines()
    assert lines[0] == (
        "step 9: 48.83 KiB kept in 3.42 KiB, 14.3x less; predicted error of each parameter's gradient 0.05 "
        "(bound 0.06), 1 site not measured"
    )
    whole = replace(REPORT, relative_to=fv.Relative.WHOLE_GRADIENT)
    assert "predicted error of the whole gradient 0.05 (bound 0.06)" in str(whole)
    assert whole.to_json()["relative_to"] == "whole gradient"
    assert " ".join(lines[3].split()) == "layers.*.up linear 2 3 bits 15.62 KiB 1.46 KiB 10.7 0.05 100.0%"
    assert " ".join(lines[4].split()) == "layers.* relu 1 mask 31.25 KiB 1000 B 32.0 0 0"
    assert " ".join(lines[5].split()) == "head gelu 1 8 bits 3.91 KiB 1000 B 4.0 ? ?"
    assert lines[7] == "3 audits, 67% within the bound; the last, of step 9: predicted 0.05, true 0.07"
    # columns stand under one another
    assert len({line.index(cell) for line, cell in zip(lines[2:6], ("sto", "3 b", "mas", "8 b"), strict=True)}) == 1


@pytest.mark.parametrize("width", [80, 140])
def test_rich_shows_the_same(width: int) -> None:
    text = io.StringIO()
    Console(file=text, width=width).print(REPORT)
    shown = text.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    for line in REPORT._lines():
        # where there is little room names are folded, figures are not
        for cell in line if width > 80 else line[4:]:
            assert cell in shown


def test_it_is_plain_json() -> None:
    read = json.loads(json.dumps(REPORT.to_json(), allow_nan=False))
    assert [r["error"] for r in read["rows"]] == [0.03, 0.04, 0.0, None]
    assert [r["share"] for r in read["rows"]] == pytest.approx([0.36, 0.64, 0, 0])
    assert read["audits"][0] == {"step": 3, "predicted": None, "audited": 0.02}
    assert read["bound_held"] == pytest.approx(2 / 3)


def test_nothing_yet() -> None:
    empty = fv.compress_activations(nn.Linear(2, 2), error=0.1).report()
    assert empty == SavedReport(0, (), 0, 0, 0.1, ())
    assert (empty.ratio, empty.predicted, empty.share([])) == (1.0, 0.0, 0.0)
    assert math.isnan(empty.bound_held)
    assert str(empty).endswith("no audit yet")
    assert json.loads(json.dumps(empty.to_json(), allow_nan=False))["bound_held"] is None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(F.relu(self.up(x))))
        return y


def test_a_stores_report_says_what_it_keeps() -> None:
    model = Model()
    store = fv.compress_activations(model, error=0.1)
    for _ in range(4):
        with store:
            model(torch.randn(100, 64)).square().mean().backward()
    report = store.report()
    rows = {row.site.partition(".")[0] + " " + row.operation: row for row in report.rows}
    up = rows["up:saved linear"]
    assert (up.layer, up.form, up.bytes_before) == ("up", "grouped", 100 * 64 * 4)
    assert up.bytes_after == 25 * (256 * up.bits // 8 + 4)
    relu = rows["model:saved relu"]
    assert (relu.form, relu.bits, relu.error, relu.bytes_before) == ("masked", 1, 0.0, 100 * 256 * 4)
    assert report.step == 3
    assert report.unmeasured == ()
    assert report.bytes_after == sum(row.bytes_after for row in report.rows) < report.bytes_before / 4
    assert 0 < report.predicted <= 0.1
    assert report.share(report.rows) == pytest.approx(1)
    assert report.audits
    assert all(0 < audit.audited < 1 for audit in report.audits)


def test_with_levels_given_there_is_no_bound() -> None:
    model = Model()
    store = fv.compress_activations(model, levels=4)
    with store:
        model(torch.randn(100, 64)).square().mean().backward()
    report = store.report()
    assert report.bound is None
    assert "bound" not in str(report)
    assert set(report.unmeasured) == {row.site for row in report.rows if row.form == "grouped"}


def test_a_narrow_table_keeps_its_names() -> None:
    rows = tuple(replace(row, site=row.site.replace("layers", "model.transformer.layers")) for row in REPORT.rows)
    text = io.StringIO()
    Console(file=text, width=72).print(replace(REPORT, rows=rows))
    shown = text.getvalue()
    assert all(len(line) <= 72 for line in shown.splitlines())
    head = shown.splitlines()[3].split()
    assert head == ["site", "operation", "stored", "as", "after", "ratio", "error"]
    assert "model.transf" in shown.replace("\n", "")
