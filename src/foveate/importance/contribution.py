"""The plain contribution of weights to outputs as their importance, as in patent 10846621. Pure functions.

    importance = 0.9 importance + 0.1 contribution,    starting at 0

The contribution of a weight to one output is |w x|. For a tile it is the mean of |w| over the tile times the root mean
square of x over its group of inputs, times the share of tokens that reach the weight. It knows nothing of what the
output is for: `foveate.importance.rolling` does, and is the default.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foveate.importance.rolling import Decay, Seen, of_tiles
from foveate.precision.sites import Site


def start_contributions(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Importance 0 for each tile: float64 [T] for each site."""
    return {name: torch.zeros(site.tiles, dtype=torch.float64) for name, site in sites.items()}


def update_contributions(
    importance: Mapping[str, Tensor],
    seen: Mapping[str, Seen],
    magnitudes: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    keep: float,
) -> dict[str, Tensor]:
    """The moving average after one observed pass. Observations that are not finite are left out.

    Args:
        importance: float64 [T] for each weight.
        seen: what was seen of each weight's inputs, or look-ups.
        magnitudes: the mean of |w| over each tile, float64 [T].
        sites: the sites of the weights.
        keep: the share of the old average that is kept, 0.9 in the patent.
    """
    found = dict(importance)
    for name, now in seen.items():
        if name not in found or not now.tokens or not bool(torch.isfinite(now.sums).all()):
            continue
        # over the rows that reach the weight the mean square is sums / rows; the share of tokens is rows / tokens
        size = of_tiles(sites[name], (now.sums.double().clamp_min(0) / now.tokens).sqrt())
        found[name] = keep * found[name] + (1 - keep) * magnitudes[name] * size
    return found


def magnitude(weight_NK: Tensor, site: Site) -> Tensor:
    """The mean of |w| over each tile, float64 [T]; padding counts as zeros.

    Args:
        weight_NK: the dense weight.
        site: its site.
    """
    strips, groups = site.grid
    rows, columns = weight_NK.shape
    padded = torch.nn.functional.pad(
        weight_NK.abs().double(), (0, groups * site.group - columns, 0, strips * 16 - rows)
    )
    return padded.view(strips, 16, groups, site.group).mean((1, 3)).flatten()


#: The decay of the patent: 0.9 of the old and 0.1 of the new.
PATENT_DECAY = Decay(keep=0.9, tokens=None)
