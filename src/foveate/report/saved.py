"""The plot of saved tensors, one SVG file: for each layer the bytes that backward needs, before and after compression.

The pale bar shows what autograd would hold, and the bar inside it what is held. Its colours show the bits of a value,
the darker the more, as in the HTML report. Grey stands for lossless forms: masks, small integers and exact tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from foveate.activations.report import SavedReport
from foveate.report.layers import split_name
from foveate.report.palette import LEVEL_COLOURS
from foveate.sizes import format_bytes

WIDTH = 820
_LEFT, _RIGHT, _TOP, _BOTTOM = 210, 178, 40, 12
_ROW, _BAR, _INNER = 24, 18, 10
_LETTERS = 32
#: The parts of a bar in order: the name in the legend, and the colour.
_KINDS: Mapping[str, tuple[str, str]] = {
    "2": ("2 bits", LEVEL_COLOURS[2]),
    "4": ("4", LEVEL_COLOURS[4]),
    "8": ("8", LEVEL_COLOURS[8]),
    "16": ("16", "var(--most)"),
    "lossless": ("without loss", LEVEL_COLOURS[0]),
}
_STYLE = (
    ":root{color-scheme:light dark;--ink:#1d2026;--soft:#626873;--track:#e6e3dc;--most:#1b0d33}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e8e6e1;--soft:#9aa1ad;--track:#343945;--most:#b79be6}}"
    "text{font:12.5px system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif;fill:var(--soft)}"
    ".name{fill:var(--ink)}.before{fill:var(--track)}"
)


@dataclass
class _Layer:
    before: int = 0
    after: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0))


def bytes_by_layer(report: SavedReport) -> dict[str, tuple[int, dict[str, int]]]:
    """For each layer in order: the bytes before compression, and the bytes held at each number of bits or `lossless`.

    A layer is a path up to its first number, such as `model.layers.3`. A tensor that two sites save counts at the first
    of them.
    """
    layers: dict[str, _Layer] = {}
    for row in report.rows:
        layer = layers.setdefault(split_name(row.layer)[0], _Layer())
        layer.before += row.bytes_before
        layer.after[str(row.bits) if row.form == "grouped" else "lossless"] += row.bytes_after
    return {name: (layer.before, layer.after) for name, layer in layers.items()}


def saved_plot(report: SavedReport) -> str:
    """The plot as an SVG file. Layers with less than a thousandth of the largest layer's bytes are left out."""
    layers = bytes_by_layer(report)
    most = max((max(before, sum(after.values())) for before, after in layers.values()), default=0)
    shown = {name: sizes for name, sizes in layers.items() if max(sizes[0], sum(sizes[1].values())) * 1000 >= most > 0}
    height = _TOP + _ROW * len(shown) + _BOTTOM
    parts = [_legend(report)]
    scale = (WIDTH - _LEFT - _RIGHT) / max(most, 1)
    for i, (name, (before, after)) in enumerate(shown.items()):
        parts.append(_row(name, before, after, _TOP + i * _ROW, scale))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="bytes kept for backward, by layer"><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _legend(report: SavedReport) -> str:
    sizes = f"{format_bytes(report.bytes_before)} → {format_bytes(report.bytes_after)}, {report.ratio:.1f}x less"
    parts = [
        _text(WIDTH - 8, 20, sizes, "name", "end"),
        _swatch(8, "var(--track)"),
        _text(25, 20, "as autograd saves it"),
    ]
    x = 168
    for name, colour in _KINDS.values():
        parts += [_swatch(x, colour), _text(x + 17, 20, name)]
        x += 34 + 7 * len(name)
    return "".join(parts)


def _row(name: str, before: int, after: Mapping[str, int], top: int, scale: float) -> str:
    short = name if len(name) <= _LETTERS else f"…{name[-_LETTERS + 1 :]}"
    held = sum(after.values())
    parts = [
        _text(_LEFT - 10, top + 14, short, "name", "end"),
        f'<rect class="before" x="{_LEFT}" y="{top}" width="{before * scale:.1f}" height="{_BAR}" rx="2"/>',
    ]
    x = float(_LEFT)
    for kind, (_, colour) in _KINDS.items():
        width = after[kind] * scale
        if width:
            inner = top + (_BAR - _INNER) / 2
            parts.append(
                f'<rect x="{x:.1f}" y="{inner:g}" width="{width:.1f}" height="{_INNER}" style="fill:{colour}"/>'
            )
        x += width
    label = f"{format_bytes(before)} → {format_bytes(held)}"
    parts.append(_text(_LEFT + max(before, held) * scale + 8, top + 14, label))
    return f"<g><title>{escape(f'{name}: {label}')}</title>{''.join(parts)}</g>"


def _swatch(x: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="9" width="12" height="12" rx="2" style="fill:{colour}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
