"""One colour a level, the same in the terminal and on the page.

An ordinal scale of falling lightness (viridis, its ends cut off), so that it reads in order in grey and with any kind
of colour blindness: the more bits, the darker. Sensitivity has a scale of another hue, from the page's own colour to
deep red.
"""

from __future__ import annotations

LEVEL_COLOURS: dict[int, str] = {0: "#b4b8c0", 2: "#f0dd3b", 3: "#6fcb5c", 4: "#21918c", 6: "#33638d", 8: "#472878"}
#: Black or white, whichever is read better on the level's colour.
LEVEL_INKS: dict[int, str] = {0: "#000000", 2: "#000000", 3: "#000000", 4: "#ffffff", 6: "#ffffff", 8: "#ffffff"}


def heat_colour(share: float) -> str:
    """The colour of a value between 0 (least) and 1 (most): one hue, more of it the more there is, over any page."""
    return f"rgb(209 43 76 / {0.06 + 0.94 * min(max(share, 0.0), 1.0):.2f})"
