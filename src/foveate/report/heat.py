"""A heat map as one SVG: rows of names, columns of moments or words, and marks at some columns.

Neighbouring cells of one shade are one rectangle, so that a map of hundreds of weights over hundreds of moments stays a
small page. Values have ten shades of one hue; the legend has their ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from foveate.report.palette import heat_colour

_SHADES = 10
_NAMES, _WIDTH, _ROW, _TOP = 250, 1000, 13, 20
#: At most this many characters of a row's name are shown: its end, which tells it from its neighbours.
_LONGEST_NAME = 38


@dataclass(frozen=True, kw_only=True)
class Ticks:
    """What stands above the columns.

    Attributes:
        texts: at the columns that have one.
        marks: a line at each of these columns, with a tooltip.
    """

    texts: Mapping[int, str]
    marks: Mapping[int, str]


def heat_chart(table: Mapping[str, Sequence[float]], ticks: Ticks, unit: str, digits: int = 2) -> str:
    """The map and its legend as HTML.

    Args:
        table: for each row its values, as many for each; a value that is not finite has no colour.
        ticks: what stands above the columns.
        unit: what the values are.
        digits: of the values, in tooltips and in the legend.
    """
    values = [value for row in table.values() for value in row if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    columns = max((len(row) for row in table.values()), default=0)
    each = (_WIDTH - _NAMES) / max(columns, 1)
    lines = [_row(name, row, y, each, low, high, digits) for y, (name, row) in enumerate(table.items())]
    height = _TOP + _ROW * len(table) + 4
    said = "".join(
        f'<text x="{_NAMES + at * each:.1f}" y="12" class="tick">{escape(text)}</text>'
        for at, text in ticks.texts.items()
    )
    marks = "".join(
        f'<line x1="{_NAMES + at * each:.1f}" x2="{_NAMES + at * each:.1f}" y1="{_TOP - 4}" y2="{height}" class="mark">'
        f"<title>{escape(text)}</title></line>"
        for at, text in ticks.marks.items()
    )
    return (
        f'<div class="scroll"><svg class="chart heat" viewBox="0 0 {_WIDTH} {height}" role="img">{said}'
        f"{''.join(lines)}{marks}</svg></div>{_legend(low, high, unit, digits)}"
    )


def _shade(value: float, low: float, high: float) -> int:
    """The number of a value's shade, 0 to 9."""
    return min(int((value - low) / (high - low) * _SHADES), _SHADES - 1) if high > low else 0


def _colour(number: int) -> str:
    """The colour of a shade."""
    return heat_colour(number / (_SHADES - 1))


def _row(name: str, row: Sequence[float], y: int, each: float, low: float, high: float, digits: int) -> str:
    top = _TOP + _ROW * y
    shown = name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
    parts = [f'<text x="0" y="{top + 10}" class="name"><title>{escape(name)}</title>{escape(shown)}</text>']
    shades = [_shade(value, low, high) if math.isfinite(value) else None for value in row]
    at = 0
    for number, run in groupby(shades):
        length = len(list(run))
        if number is not None:
            ends = row[at], row[at + length - 1]
            tip = f"{name}: {ends[0]:.{digits}f}" + (f" to {ends[1]:.{digits}f}" if length > 1 else "")
            parts.append(
                f'<rect x="{_NAMES + at * each:.1f}" y="{top}" width="{length * each:.1f}" height="{_ROW - 1}" '
                f'fill="{_colour(number)}"><title>{escape(tip)}</title></rect>'
            )
        at += length
    return "".join(parts)


def _legend(low: float, high: float, unit: str, digits: int) -> str:
    ramp = ", ".join(_colour(number) for number in range(_SHADES))
    return (
        f'<div class="legend"><span class="key">{escape(unit)}</span><span class="num">{low:.{digits}f}</span>'
        f'<span class="ramp" style="background:linear-gradient(90deg, {ramp})"></span>'
        f'<span class="num">{high:.{digits}f}</span></div>'
    )
