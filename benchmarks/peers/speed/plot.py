"""The plot of speed, one SVG file: time of a product against bits per weight, ours and other libraries'.

The unit of time is the time that the memory needs to deliver our weight at 8 bits, measured in the same rounds. So the
plot is the same on a slow machine and on a fast one. The line at the bottom is the time that the memory needs at each
level: a product that reads the weight cannot be below it by more than noise. Layers of more than 8 bits are horizontal
lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from foveate.errors import FoveateError
from foveate.report.plot import HEIGHT, LEFT, RADIUS, RIGHT, WIDTH, Axes, grid

OURS = "foveate "
TOP_BITS = 8
_LABEL_HEIGHT = 14.0
_STYLE = (
    ":root{color-scheme:light dark;--ink:#1d2026;--soft:#626873;--line:#e3e1dc;--accent:#c2410c;--limit:#33638d}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e8e6e1;--soft:#9aa1ad;--line:#2e323b;--accent:#fb923c;"
    "--limit:#7fb0dd}}"
    "text{font:12.5px system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif;fill:var(--soft)}"
    ".grid{stroke:var(--line)}.limit{fill:none;stroke:var(--limit);stroke-width:2}.limit-name{fill:var(--limit)}"
    ".ours{fill:none;stroke:var(--accent);stroke-width:2}.dot{fill:var(--accent)}.ours-name{fill:var(--accent);font-weight:600}"
    ".peer{fill:var(--ink)}.peer-name{fill:var(--ink)}.across{stroke:var(--soft);stroke-dasharray:5 4}"
)


@dataclass(frozen=True)
class Product:
    """The measured time of one form of one library.

    Attributes:
        name: the library and the form.
        bits: bits per weight, scales not counted.
        time: in units of the time that the memory needs for our weight at 8 bits.
        limit: the time that the memory needs for this form, in the same units.
    """

    name: str
    bits: int
    time: float
    limit: float


def products(turns: Sequence[Mapping[str, Any]], rows: int = 1) -> list[Product]:
    """The medians of the benchmark `peers`.

    Args:
        turns: its rounds: `form`, `bits`, `bytes`, `rows`, `seconds` and the `bandwidth` beside them.
        rows: rows of x.

    Raises:
        FoveateError: no turn has `rows` rows, or none is ours at 8 bits.
    """
    turns_by_form: dict[str, list[Mapping[str, Any]]] = {}
    for turn in turns:
        if turn.get("rows") == rows:
            turns_by_form.setdefault(turn["form"], []).append(turn)
    unit = turns_by_form.get(f"{OURS}{TOP_BITS}")
    if unit is None:
        raise FoveateError(f"these rounds hold no product of {OURS}{TOP_BITS} with {rows} rows to compare others with")
    whole = unit[0]["bytes"]
    return [
        Product(
            name, seen[0]["bits"], median(t["seconds"] * t["bandwidth"] for t in seen) / whole, seen[0]["bytes"] / whole
        )
        for name, seen in turns_by_form.items()
    ]


def speed_plot(turns: Sequence[Mapping[str, Any]], rows: int = 1) -> str:
    """The plot of the results of `products`, as the text of an SVG file."""
    every = products(turns, rows)
    ours = sorted((p for p in every if p.name.startswith(OURS)), key=lambda p: p.bits)
    peers = [p for p in every if not p.name.startswith(OURS) and p.bits <= TOP_BITS]
    across = [p for p in every if p.bits > TOP_BITS]
    values = [p.time for p in every] + [p.limit for p in ours]
    axes = Axes([1.9, TOP_BITS + 0.9], values)
    parts = [grid(axes, "bits per weight", f"time with {rows} row{'s' * (rows != 1)} of x (memory at 8 bits: 1)")]
    lowest = float("inf")
    for p in sorted(across, key=lambda p: p.time):
        y = axes.y(p.time)
        lowest = min(y - 5, lowest - _LABEL_HEIGHT)
        parts.append(f'<line class="across" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_name("across-name", WIDTH - RIGHT, lowest, p.name, "end"))
    parts.append(_line("limit", [(axes.x(p.bits), axes.y(p.limit)) for p in ours]))
    parts.append(_line("ours", [(axes.x(p.bits), axes.y(p.time)) for p in ours]))
    parts += [_dot(axes, p) for p in ours]
    for bits in sorted({p.bits for p in peers}):
        parts += _column(axes, [p for p in peers if p.bits == bits])
    named = ours[-2:][0]  # not the last one, which peers would cover
    parts.append(_name("ours-name", axes.x(named.bits) - 10, axes.y(named.time) - 10, "foveate", "end"))
    first = ours[0]
    parts.append(
        _name("limit-name", axes.x(first.bits) + 14, axes.y(first.limit) + 16, "what the memory needs", "start")
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="time of a product against bits per weight"><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _name(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(axes: Axes, product: Product) -> str:
    x, y = axes.x(product.bits), axes.y(product.time)
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"><title>{_tip(product)}</title></circle>'


def _tip(product: Product) -> str:
    return escape(f"{product.name}: {product.time:.2f}, memory's own {product.limit:.2f}")


def _column(axes: Axes, column: Sequence[Product]) -> list[str]:
    """The squares of all forms with one number of bits, and their names beside them without overlap."""
    parts, lowest = [], float("inf")
    for p in sorted(column, key=lambda p: p.time):
        x, y = axes.x(p.bits), axes.y(p.time)
        lowest = min(y + 4, lowest - _LABEL_HEIGHT)
        parts.append(
            f'<rect class="peer" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"><title>{_tip(p)}</title></rect>'
        )
        parts.append(_name("peer-name", x + 9, lowest, p.name, "start"))
    return parts
