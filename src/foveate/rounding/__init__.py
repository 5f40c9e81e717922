"""Rounding: how weights become the codes that planes hold."""

from foveate.rounding.descent import DescentConfig as DescentConfig
from foveate.rounding.descent import degrees_of_freedom as degrees_of_freedom
from foveate.rounding.descent import descent_config as descent_config
from foveate.rounding.descent import overfit_factor as overfit_factor
from foveate.rounding.descent import with_descent as with_descent
from foveate.rounding.nearest import Rounded as Rounded
from foveate.rounding.nearest import round_weight as round_weight
