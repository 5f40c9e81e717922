"""The plot of speed against quality, one SVG file: tokens a second and KL, ours and llama.cpp's.

Down and to the right is better: less loss, more tokens. Speeds are medians over the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from benchmarks.peers.equal_quality.figures import OURS, THEIRS, Row, seconds, uniform
from foveate.errors import FoveateError
from foveate.report.plot import BOTTOM, HEIGHT, LEFT, RADIUS, RIGHT, TOP, WIDTH, Axes

_STYLE = (
    ":root{color-scheme:light dark;--ink:#1d2026;--soft:#626873;--line:#e3e1dc;--accent:#c2410c}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e8e6e1;--soft:#9aa1ad;--line:#2e323b;--accent:#fb923c}}"
    "text{font:12.5px system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif;fill:var(--soft)}"
    ".grid{stroke:var(--line)}"
    ".ours{fill:none;stroke:var(--accent);stroke-width:2}.dot{fill:var(--accent)}"
    ".ours-name{fill:var(--accent)}.title{font-weight:600}"
    ".theirs{fill:none;stroke:var(--ink);stroke-width:2}.square{fill:var(--ink)}.theirs-name{fill:var(--ink)}"
)
_TICKS = 7


@dataclass(frozen=True)
class Model:
    """A model of one size.

    Attributes:
        side: `ours` or `theirs`.
        label: the text beside it.
        speed: tokens a second.
        kl: from the float model, nats.
    """

    side: str
    label: str
    speed: float
    kl: float


def models(rows: Sequence[Row]) -> list[Model]:
    """What is drawn of the benchmark's rows: every row of quality with a time after the short prompt.

    Our uniform maps of less than 8 bits are left out, since allocated maps are better at their sizes.

    Raises:
        FoveateError: one of the sides has no such row.
    """
    times = seconds(rows)
    short = min((cached for _, cached in times), default=0)
    found = []
    for row in rows:
        key = (row["name"], short)
        if "kl" not in row or key not in times:
            continue
        if row["side"] == OURS and row["name"].startswith("uniform") and row["name"] != uniform(8):
            continue
        label = row["name"] if row["side"] == THEIRS else f"{row['bits']:.2f}"
        found.append(Model(row["side"], label, 1 / median(times[key].values()), row["kl"]))
    if {m.side for m in found} != {OURS, THEIRS}:
        raise FoveateError("these rounds do not hold times and KL of both sides")
    return sorted(found, key=lambda m: m.kl)


def step_of(low: float, high: float) -> float:
    """The distance between ticks, 1, 2 or 5 times a power of ten, so that there are about seven."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1.0, 2.0, 5.0, 10.0) if f * power >= rough)


def quality_plot(rows: Sequence[Row]) -> str:
    """The plot of a result's rounds, as the text of an SVG file."""
    every = models(rows)
    axes = Axes([0.0, 1.2 * max(m.speed for m in every)], [m.kl for m in every])
    axes.left = 0
    parts = [_grid(axes)]
    for side, mark in ((OURS, "ours"), (THEIRS, "theirs")):
        line = [(axes.x(m.speed), axes.y(m.kl)) for m in every if m.side == side]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline class="{mark}" points="{points}"/>')
    last = {OURS: math.inf, THEIRS: math.inf}
    for m in sorted(every, key=lambda m: -axes.y(m.kl)):  # from the bottom, so that names do not cover each other
        x, y = axes.x(m.speed), axes.y(m.kl)
        tip = f"<title>{escape(m.label)}: {m.speed:.0f} tokens/s, KL {m.kl:.4f}</title>"
        if m.side == OURS:
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}">{tip}</circle>')
        else:
            parts.append(f'<rect class="square" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{tip}</rect>')
        if last[m.side] - y >= 14:
            last[m.side] = y
            parts.append(_name(m.side, "", x, y + 4, m.label))
    ours = next(m for m in reversed(every) if m.side == OURS)
    theirs = next(m for m in reversed(every) if m.side == THEIRS)
    for m, text in ((ours, "foveate, bits a weight"), (theirs, "llama.cpp")):
        parts.append(_name(m.side, " title", axes.x(m.speed), axes.y(m.kl) - 12, text))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="tokens a second against KL"><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _name(side: str, title: str, x: float, y: float, text: str) -> str:
    """A name beside a point: theirs to the left and ours to the right, where they do not meet; titles to the left."""
    to_left = bool(title) or side == THEIRS
    anchor = ' text-anchor="end"' if to_left else ""
    beside = x - 10 if to_left else x + 10
    return f'<text class="{side}-name{title}" x="{beside:.1f}" y="{y:.1f}"{anchor}>{escape(text)}</text>'


def _grid(axes: Axes) -> str:
    """The grid lines, and the labels of the axes."""
    parts = []
    step = step_of(axes.left, axes.right)
    for i in range(int(axes.right / step) + 1):
        x = axes.x(i * step)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{i * step:g}</text>')
    for value in axes.ticks():
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">tokens a second</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        "KL from the float model, nats, log scale</text>"
    )
    return "".join(parts)
