"""Loss per tile and level, from statistics and planes."""

from foveate.sensitivity.fisher import tile_losses as tile_losses
