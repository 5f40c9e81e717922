"""Pages on what moved: heat maps whose cells are the values, words on the shade of their bits, and odd input."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import foveate as fv
from foveate.errors import DataError
from foveate.importance.verdict import Decision, Snapshot, Verdict
from foveate.report import following_page, input_page
from foveate.report.heat import Ticks, heat_chart
from tiny import mlp, quantized_llama, quick_tracking, rows, tokens

_VOID = {"meta", "br"}


class _Balanced(HTMLParser):
    """Fails where a tag is not closed, or where something is fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _checked(page: str) -> str:
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []
    return page


def _decision(token: int, accepted: bool = True) -> Decision:
    return Decision(
        token=token, source="online", accepted=accepted, tiles=7, bytes=4096, before=0.5, after=0.4,
        predicted_before=0.5, predicted_after=0.4,
    )  # fmt: skip


def test_cells_are_the_values_and_neighbours_of_one_shade_are_one() -> None:
    made = heat_chart(
        {"a": [0, 0, 0, 9, 9], "b": [1, math.nan, 2, 5, 9]}, Ticks(texts={2: "two"}, marks={3: "<here>"}), "bits"
    )
    cells = re.findall(r'<rect x="([\d.]+)" y="(\d+)" width="([\d.]+)".*?fill="(.*?)"><title>(.*?)</title>', made)
    assert [cell[4] for cell in cells] == [
        "a: 0.00 to 0.00", "a: 9.00 to 9.00", "b: 1.00", "b: 2.00", "b: 5.00", "b: 9.00",
    ]  # fmt: skip
    assert float(cells[0][2]) == pytest.approx(1.5 * float(cells[1][2]), abs=0.2)
    assert len({cell[3] for cell in cells}) == 5
    assert cells[1][3] == cells[5][3]
    assert "&lt;here&gt;" in made
    assert ">two<" in made
    _checked(made)


@pytest.mark.parametrize("table", [{}, {"a": []}, {"a": [math.nan, math.inf]}, {"a": [3.0, 3.0]}])
def test_maps_without_a_range(table: dict[str, list[float]]) -> None:
    _checked(heat_chart(table, Ticks(texts={}, marks={}), "bits"))


def test_a_stream_that_moved() -> None:
    history = [
        Snapshot(token=100 * n, bits={"x<y:weight": 4.0 + n % 2, "z:weight": 2.0}, importance={"z:weight": 10.0**n})
        for n in range(5)
    ]
    verdict = Verdict(
        tokens=400, decisions=[_decision(200), _decision(300, False), _decision(399)], shadow_tokens=64,
        refused_observations=0,
    )  # fmt: skip
    page = _checked(following_page(history, verdict, "a <model>"))
    assert "a &lt;model&gt;" in page
    assert "x&lt;y" in page
    assert page.count('class="mark"') == 2 * 2  # two moves in two maps; what was refused is in the list alone
    assert "was refused" in page
    assert "z: 0.00" in page
    assert "z: 4.00" in page
    with pytest.raises(DataError, match="there is no moment yet"):
        following_page([], verdict)


def test_a_real_tracker() -> None:
    model = mlp()
    fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    options = quick_tracking(decide_every=2048)  # not by time: how many passes are observed differs from run to run
    with fv.track_importance(model, fv.Budget(bits=5.0), options=options) as tracker:
        for x in torch.randn(100, 64, 70):
            model(x)
    page = _checked(following_page(tracker.history, tracker.verdict))
    assert all(f">{name}<" in page for name in ("0", "2", "4"))


def test_an_input_whose_rows_chose() -> None:
    model, _ = quantized_llama()
    with fv.adapt_to_input(model, bits=5.0, batches=tokens(8, 24, 6), progress=False) as _:
        explained = fv.explain(model, {"input_ids": torch.tensor([[4, 9, 1, 7]])})
    page = _checked(input_page(explained, ["<a>", "b", "c", "d"], "four & words"))
    assert "four &amp; words" in page
    assert "&lt;a&gt;" in page
    for bits in explained.token_bits.tolist():
        assert f'title="{bits:.3f} bits"' in page
    assert all(layer.site.removesuffix(":weight") in page for layer in explained.layers)
    _checked(input_page(explained))
    with pytest.raises(DataError, match="3 words are given for 4 rows"):
        input_page(explained, ["a", "b", "c"])


def test_a_long_input_is_cut_and_says_so() -> None:
    count = 500
    layer = SimpleNamespace(
        site="a:weight", reads_high=torch.arange(count) % 2 == 0, bits=torch.arange(count) % 2 + 2.0, levels=(2.0, 3.0),
        estimated=torch.zeros(count), true=torch.zeros(count), threshold=0.0,
    )  # fmt: skip
    map_: Any = SimpleNamespace(bits=2.0)
    explained: Any = SimpleNamespace(token_bits=torch.full((count,), 2.5), low=map_, high=map_, layers=(layer,))
    assert "The first 400 of 500 rows are shown." in _checked(input_page(explained))
