"""The plot of the frontier, one SVG: loss on a logarithmic axis against average bits per weight.

The line is the lowest loss that the profile predicts for each size. Squares are uniform precision, and the diamond is
the map of the report. Circles are measured losses, with whiskers of one standard error where they are long enough to
see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 820, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 18, 50
RADIUS = 5


@dataclass(frozen=True)
class Mark:
    """A point of the plot.

    Attributes:
        bits: average bits per weight.
        loss: the predicted or measured loss.
        label: the text beside the point.
        tip: the tooltip.
        kind: the CSS class: `uniform`, `chosen` or `measured`.
        error: the standard error, or 0 without one.
    """

    bits: float
    loss: float
    label: str
    tip: str
    kind: str
    error: float = 0.0


def _drawable(mark: Mark) -> bool:
    return mark.loss > 0 and math.isfinite(mark.loss) and math.isfinite(mark.bits)


class Axes:
    """The transformation from (bits, value) to pixels, with values on a logarithmic scale."""

    def __init__(self, bits: Sequence[float], values: Sequence[float]) -> None:
        self.left, self.right = math.floor(min(bits) - 0.2), math.ceil(max(bits) + 0.2)
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.06 * (high - low), 0.12)
        self.low, self.high = low - room, high + room

    def x(self, bits: float) -> float:
        """The distance from the left edge in pixels."""
        return LEFT + (bits - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """The distance from the top edge in pixels."""
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return TOP + (1 - min(max(share, 0.0), 1.0)) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        """The powers of ten in range, and their multiples by 2 and 5 where the range is short."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1, 2, 5) if self.high - self.low < 3 else (1,)
        ticks = [f * 10.0**p for p in powers for f in factors]
        return [t for t in ticks if self.low <= math.log10(t) <= self.high]


def grid(axes: Axes, bits_name: str, value_name: str) -> str:
    """The grid lines behind the plot, and the labels of its axes."""
    parts = []
    step = max(1, round((axes.right - axes.left) / 8))
    for bits in range(axes.left, axes.right + 1, step):
        x = axes.x(bits)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{bits}</text>')
    for value in axes.ticks():
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(bits_name)}</text>"
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(value_name)}, log scale</text>"
    )
    return "".join(parts)


def _shape(mark: Mark, x: float, y: float) -> str:
    if mark.kind == "uniform":
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" rx="1.5"/>'
    if mark.kind == "chosen":
        return f'<path d="M{x:.1f} {y - 8:.1f}l8 8l-8 8l-8 -8z"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>'


def _mark(mark: Mark, axes: Axes) -> str:
    x, y = axes.x(mark.bits), axes.y(mark.loss)
    whisker = ""
    if mark.error > 0:
        top, bottom = axes.y(mark.loss + mark.error), axes.y(max(mark.loss - mark.error, 1e-300))
        if bottom - top > 2 * RADIUS:  # a shorter whisker would be hidden inside its circle
            whisker = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
    # the line falls to the right, so labels of uniform levels fit above it, and the label of the map below it
    dx, dy, anchor = (-12, 16, "end") if mark.kind == "chosen" else (10, -8, "start")
    text = (
        f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{escape(mark.label)}</text>'
        if mark.label
        else ""
    )
    return f'<g class="{mark.kind}"><title>{escape(mark.tip)}</title>{whisker}{_shape(mark, x, y)}{text}</g>'


def plot(line: Sequence[tuple[float, float]], marks: Sequence[Mark], loss_name: str) -> str:
    """The plot as SVG; an empty string if no loss is positive.

    Args:
        line: (bits, predicted loss) along the frontier.
        marks: the points, drawn in order.
        loss_name: the name of the loss, with its unit.
    """
    line = [(bits, loss) for bits, loss in line if loss > 0 and math.isfinite(loss)]
    marks = [mark for mark in marks if _drawable(mark)]
    if not line and not marks:
        return ""
    axes = Axes([b for b, _ in line] + [m.bits for m in marks], [v for _, v in line] + [m.loss for m in marks])
    path = " ".join(f"{axes.x(bits):.1f},{axes.y(loss):.1f}" for bits, loss in line)
    drawn = "".join(_mark(mark, axes) for mark in marks)
    size = f"0 0 {WIDTH} {HEIGHT}"
    curve = f'<polyline class="frontier" points="{path}"/>' if len(line) > 1 else ""
    return (
        f'<svg class="plot chart" viewBox="{size}" role="img" aria-label="loss against average bits per weight">'
        f"{grid(axes, 'average bits per weight, scales included', loss_name)}{curve}{drawn}</svg>"
    )
