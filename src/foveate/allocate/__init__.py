"""From a profile and a budget to a precision map, and to the whole frontier of maps. Numbers in, numbers out."""

from foveate.allocate.constraints import Constraints as Constraints
from foveate.allocate.frontier import frontier as frontier
from foveate.allocate.inputs import variance_proxy as variance_proxy
from foveate.allocate.plan import allocate as allocate
