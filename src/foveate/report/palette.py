"""One colour a level, the same in the terminal and on the page.

An ordinal scale of falling lightness (viridis, its dark end cut off), so that it reads in order in grey and with any kind of colour blindness: the more bits, the darker.
Sensitivity has a scale of another hue, from pale to deep red.
"""

from __future__ import annotations

LEVEL_COLOURS: dict[int, str] = {0: "#b4b8c0", 2: "#f0dd3b", 3: "#6fcb5c", 4: "#21918c", 6: "#33638d", 8: "#472878"}
#: Black or white, whichever is read better on the level's colour.
LEVEL_INKS: dict[int, str] = {0: "#000000", 2: "#000000", 3: "#000000", 4: "#ffffff", 6: "#ffffff", 8: "#ffffff"}

_HEAT = ((254, 240, 227), (253, 204, 158), (247, 142, 96), (217, 72, 62), (139, 16, 62))


def heat_colour(share: float) -> str:
    """The colour of a value between 0 (least) and 1 (most)."""
    position = min(max(share, 0.0), 1.0) * (len(_HEAT) - 1)
    low = min(int(position), len(_HEAT) - 2)
    mixed = (round(a + (b - a) * (position - low)) for a, b in zip(_HEAT[low], _HEAT[low + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)
