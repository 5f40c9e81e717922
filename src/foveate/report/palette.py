"""The colours of levels, the same in the terminal and in the HTML report.

Levels have an ordinal scale of falling lightness: the colour map viridis without its ends. More bits are darker, so the
order is visible in grey and with any kind of colour blindness. Sensitivity has a scale of another hue, from the page's
background to deep red.
"""

from __future__ import annotations

LEVEL_COLOURS: dict[int, str] = {
    0: "#b4b8c0",
    2: "#f0dd3b",
    3: "#6fcb5c",
    4: "#21918c",
    6: "#33638d",
    8: "#472878",
    16: "#220a3d",
    32: "#000000",
}
#: Black or white, whichever has more contrast on the level's colour.
LEVEL_INKS: dict[int, str] = {level: "#000000" if level in (0, 2, 3) else "#ffffff" for level in LEVEL_COLOURS}


def heat_colour(share: float) -> str:
    """The colour of a value from 0 (lowest) to 1 (highest): one hue of rising opacity, over any background."""
    return f"rgb(209 43 76 / {0.06 + 0.94 * min(max(share, 0.0), 1.0):.2f})"
