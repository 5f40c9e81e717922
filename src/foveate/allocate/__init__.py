"""From a profile and a budget to a precision map, and to the whole frontier of maps. Numbers in, numbers out."""

from foveate.allocate.frontier import frontier as frontier
from foveate.allocate.inputs import by_variance as by_variance
from foveate.allocate.plan import allocate as allocate
