"""How weights become the codes that planes hold."""

from foveate.rounding.nearest import Rounded, round_weight

__all__ = ["Rounded", "round_weight"]
