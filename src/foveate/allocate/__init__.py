"""Allocation: from a profile and a budget to a precision map or a frontier of maps. It takes numbers, not models."""

from foveate.allocate.constraints import Constraints as Constraints
from foveate.allocate.frontier import frontier as frontier
from foveate.allocate.inputs import variance_proxy as variance_proxy
from foveate.allocate.plan import allocate as allocate
