"""From a profile and a budget to a precision map, and to the whole frontier of maps. Numbers in, numbers out."""

from foveate.allocate.frontier import frontier as frontier
from foveate.allocate.solve import allocate as allocate
