from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import foveate as fv
from foveate.precision.maps import PrecisionMap, Site, uniform
from foveate.precision.profiles import Profile
from foveate.report import Measured, html
from foveate.report.palette import LEVEL_COLOURS, heat_colour
from foveate.report.plot import Mark, plot

HOSTILE = "<script>alert('x')</script>\"&.0.<img src=x>w'"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checked(HTMLParser):
    """Every element closed, in order, and nothing but plain text, style and drawing."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def model(layers: int, extra: str = "head") -> tuple[Site, ...]:
    parts = ("attn.q_proj", "attn.k_proj", "mlp.up_proj")
    names = ["embed", *(f"model.layers.{i}.{part}" for i in range(layers) for part in parts), extra]
    return tuple(Site(f"{name}:weight", "weight", 32, 64, 32, rows_read=32) for name in names)


def profile_of(sites: tuple[Site, ...]) -> Profile:
    falling = torch.tensor([1, 0.3, 0.1, 0.03, 0.003, 0.0003])
    losses = {s.name: falling * torch.rand(s.tiles, 1) * 1e-3 for s in sites}
    return Profile(sites, losses, 100, 4096, "logits", notes=("a note with <angles>",))


@pytest.mark.parametrize("layers", [1, 8, 80])
def test_the_page_is_well_formed_and_complete(layers: int) -> None:
    profile = profile_of(model(layers))
    plan = fv.allocate(profile, fv.Budget(bits=5.5), fv.Constraints(levels=(0, 2, 3, 4, 6, 8)))
    outcome = fv.Outcome(0.0123, 0.001, 0.9, 1.5, 512)
    measured = [Measured("chosen", plan, outcome, True), Measured("reference", None, replace(outcome, divergence=0.0))]
    page = html(plan, title="tiny", profile=profile, frontier=fv.frontier(profile, 8), measured=measured)
    checked = Checked(page)
    text = " ".join(checked.text)
    bits = f"{plan.bits:.2f}"
    for word in ("tiny", bits, "q_proj", f"model.layers.{layers - 1}", "0.0123", "90.0%", "uniform precision", "1.5"):
        assert word in text
    assert sum(value == "bar" for key, value in checked.attributes if key == "class") == 3 * layers + 2
    assert len(page) < 20_000 + layers * 8_000


def test_it_fetches_and_runs_nothing() -> None:
    profile = profile_of(model(2))
    page = html(profile.uniform(4), profile=profile, frontier=fv.frontier(profile, 4))
    checked = Checked(page)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(checked.tags)
    assert not {"src", "href", "action"} & {key for key, _ in checked.attributes}
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page


@pytest.mark.parametrize("layers", [0, 2])
def test_hostile_names_are_text(layers: int) -> None:
    profile = replace(profile_of(model(layers, HOSTILE)), notes=(HOSTILE,))
    plan = profile.uniform(4)
    measured = [Measured(HOSTILE, plan, fv.Outcome(0.1, 0.0, 1.0, 0.5, 9), True)]
    page = html(plan, title=HOSTILE, profile=profile, measured=measured, metric=HOSTILE, notes=[HOSTILE])
    checked = Checked(page)
    assert not {"script", "img"} & set(checked.tags)
    assert "<script" not in page
    assert HOSTILE in checked.text
    assert any(HOSTILE in (value or "") for key, value in checked.attributes if key == "title")


def test_a_map_alone_is_enough() -> None:
    page = html(uniform(model(2), 4))
    checked = Checked(page)
    assert "Where the bits are" in checked.text
    assert "Loss against size" not in checked.text
    assert "heats" not in [value for key, value in checked.attributes if key == "class"]
    assert "nan" not in page.lower()


def test_many_parts_become_rows() -> None:
    sites = tuple(Site(f"layers.0.experts.{i}.up:weight", "weight", 32, 64, 32) for i in range(40))
    page = html(uniform(sites, 4), profile=profile_of(sites))
    assert sum(value == "bar" for key, value in Checked(page).attributes if key == "class") == 41


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(fv.SiteError, match="different models"):
        html(uniform(model(1), 4), profile=profile_of(model(2)))


def test_losses_that_cannot_be_drawn_are_left_out() -> None:
    marks = [Mark(4, loss, "m", "m", "measured", 0.1) for loss in (0.0, math.nan, math.inf, -1.0)]
    assert plot([], marks, "loss") == ""
    drawn = plot([(2, 1.0), (4, 0.0), (8, 0.01)], [Mark(4, 0.1, "<m>", "t", "measured", 0.2), *marks], "loss")
    Checked(drawn)
    assert drawn.count("<circle") == 1
    assert "&lt;m&gt;" in drawn
    assert "nan" not in drawn
    Checked(plot([], [Mark(4, 0.1, "one", "t", "chosen")], "loss"))


def test_equal_and_zero_sensitivities_have_a_colour() -> None:
    sites = model(1)
    flat = replace(profile_of(sites), losses={s.name: torch.ones(s.tiles, 6) for s in sites})
    none = replace(flat, losses={s.name: torch.zeros(s.tiles, 6) for s in sites})
    for profile in (flat, none):
        Checked(html(PrecisionMap(sites, {s.name: 4 for s in sites}, 100), profile=profile))


def test_more_bits_are_darker() -> None:
    def lightness(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    nested = [lightness(colour) for level, colour in LEVEL_COLOURS.items() if level]
    assert nested == sorted(nested, reverse=True)
    assert heat_colour(-1) == heat_colour(0) != heat_colour(1) == heat_colour(2)
