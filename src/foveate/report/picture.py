"""The picture of a map: where its bits are, and beside them the sensitivity that the profile measured.

Each layer has a row and each weight of a layer a column. A cell is a stacked bar of the share of the weight's tiles at
each level. The coloured squares at the end of a row show what each of its weights would lose at 2 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from foveate.formats.levels import TOP_LEVEL, WEIGHT_LEVELS
from foveate.precision.maps import PrecisionMap, Site
from foveate.precision.profiles import Profile
from foveate.report.layers import (
    Block,
    Layer,
    blocks_of,
    layers_of,
    mean_level,
    module_path,
    percent,
    shares,
    stored_bytes,
)
from foveate.report.palette import LEVEL_COLOURS, heat_colour
from foveate.sizes import format_bytes

#: A layer with more parts has no columns: the layer is one bar, and each part has a row below it.
MAX_COLUMNS = 9
#: At most this many characters of a layer's name are shown.
MAX_NAME_LENGTH = 27
#: The level whose loss the heat map shows.
HEAT_LEVEL = 2


def bar(plan: PrecisionMap, sites: Sequence[Site], what: str) -> str:
    """One stacked bar as HTML; `what` is its name in the tooltip."""
    share_of = shares(plan, sites)
    said = ", ".join(f"{percent(share)} at {level}" for level, share in reversed(share_of.items()) if share)
    tip = f"{what}: {said}; mean level {mean_level(plan, sites):.2f}, {format_bytes(stored_bytes(plan, sites))}"
    segments = "".join(
        f'<i class="l{level}" style="flex:{share:.4f}"></i>' for level, share in reversed(share_of.items()) if share
    )
    return f'<div class="bar" title="{escape(tip)}">{segments}</div>'


class Heat:
    """The colour of each weight's sensitivity, on a logarithmic scale over the model."""

    def __init__(self, profile: Profile) -> None:
        column = WEIGHT_LEVELS.index(HEAT_LEVEL)
        self.losses = {s.name: float(profile.losses[s.name][:, column].double().sum()) for s in profile.weight_sites()}
        positive = [loss for loss in self.losses.values() if loss > 0 and math.isfinite(loss)]
        self.lowest, self.highest = (min(positive), max(positive)) if positive else (1.0, 1.0)

    def strip(self, sites: Sequence[Site]) -> str:
        """A table cell with one square for each weight, in the colour of its loss."""
        squares = []
        for site in sites:
            loss = self.losses[site.name]
            tip = f"{module_path(site)} at {HEAT_LEVEL} bits would lose {loss:.3g}"
            squares.append(f'<i style="background:{self._colour(loss)}" title="{escape(tip)}"></i>')
        return f'<td class="strip"><div class="heats">{"".join(squares)}</div></td>'

    def _colour(self, loss: float) -> str:
        if not loss > 0:
            return heat_colour(0)
        spread = math.log(self.highest / self.lowest)
        return heat_colour(math.log(loss / self.lowest) / spread if spread > 0 else 1.0)

    def legend(self) -> str:
        """The colour scale, with the lowest and the highest loss at its ends."""
        ramp = ", ".join(heat_colour(i / 8) for i in range(9))
        return (
            f'<div class="legend"><span class="key">loss at {HEAT_LEVEL} bits</span>'
            f'<span class="num">{self.lowest:.2g}</span>'
            f'<span class="ramp" style="background:linear-gradient(90deg, {ramp})"></span>'
            f'<span class="num">{self.highest:.2g}</span></div>'
        )


def level_legend(plan: PrecisionMap) -> str:
    """The colour of each level, with the share of all tiles at that level."""
    share_of = shares(plan, list(plan.weight_sites()))
    keys = []
    for level in reversed(LEVEL_COLOURS):
        if share_of[level] or 0 < level <= TOP_LEVEL:
            name = f"{level} bits" if level else "dropped"
            swatch = f'<i class="swatch l{level}"></i>{name} <span class="num">{percent(share_of[level])}</span>'
            keys.append(f'<span class="key">{swatch}</span>')
    return f'<div class="legend">{"".join(keys)}</div>'


def _row(plan: PrecisionMap, name: str, bars: str, sites: Sequence[Site], strip: str) -> str:
    head = f'<th scope="row" title="{escape(name)}">{escape(_shortened(name))}</th>'
    return f'<tr>{head}{bars}<td class="mean">{mean_level(plan, sites):.2f}</td>{strip}</tr>'


def _columns(plan: PrecisionMap, block: Block, heat: Heat | None) -> str:
    """A table with a row for each layer and a column for each part."""
    rows = []
    for layer in block.layers:
        bars = "".join(f"<td>{bar(plan, [s], module_path(s))}</td>" for s in layer.sites)
        rows.append(_row(plan, layer.name, bars, layer.sites, "" if heat is None else heat.strip(layer.sites)))
    heads = "".join(f'<th scope="col" title="{escape(part)}">{escape(_short(part))}</th>' for part in block.parts)
    strip = "" if heat is None else '<th class="strip"></th>'
    return _table(len(block.parts), f'<thead><tr><th></th>{heads}<th class="mean">mean</th>{strip}</tr></thead>', rows)


def _one_row_each(plan: PrecisionMap, layers: Sequence[Layer], heat: Heat | None) -> str:
    """A table of layers with one weight or with too many for columns: each weight has a wide bar in its own row."""
    rows = []
    for layer in layers:
        if len(layer.sites) > 1:
            strip = "" if heat is None else '<td class="strip"></td>'
            rows.append(_row(plan, layer.name, f"<td>{bar(plan, layer.sites, layer.name)}</td>", layer.sites, strip))
        for site in layer.sites:
            path = module_path(site)
            strip = "" if heat is None else heat.strip([site])
            rows.append(_row(plan, path, f"<td>{bar(plan, [site], path)}</td>", [site], strip))
    return _table(1, "", rows)


def _shortened(name: str) -> str:
    """The name, or the end of a name that is too long for its column: names differ at their ends."""
    return name if len(name) <= MAX_NAME_LENGTH else f"…{name[1 - MAX_NAME_LENGTH :]}"


def _table(columns: int, head: str, rows: Sequence[str]) -> str:
    return f'<table class="map" style="--columns:{columns}">{head}<tbody>{"".join(rows)}</tbody></table>'


def _short(part: str) -> str:
    """The last word of a part's path, with the word before it where the last word alone is ambiguous."""
    words = part.split(".")
    return (
        ".".join(words[-2:])
        if words[-1] in ("dense", "weight", "proj", "fc", "linear") or words[-1].isdigit()
        else words[-1]
    )


def picture(plan: PrecisionMap, profile: Profile | None) -> str:
    """The whole picture with its legends, as HTML."""
    heat = None if profile is None else Heat(profile)
    blocks = blocks_of(layers_of(plan.sites))
    widest = max((len(b.parts) for b in blocks if len(b.parts) <= MAX_COLUMNS), default=1)
    parts = [f'<div class="legends">{level_legend(plan)}{"" if heat is None else heat.legend()}</div>']
    singles: list[Layer] = []
    for block in blocks:
        if 1 < len(block.parts) <= MAX_COLUMNS:
            if singles:
                parts.append(_one_row_each(plan, singles, heat))
                singles = []
            parts.append(_columns(plan, block, heat))
        else:
            singles += block.layers
    if singles:
        parts.append(_one_row_each(plan, singles, heat))
    style = f"--strip:{0 if heat is None else widest}"
    return f'<div class="picture" style="{style}">{"".join(parts)}</div>'
