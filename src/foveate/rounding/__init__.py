"""How weights become the codes that planes hold."""

from foveate.rounding.descent import Belief as Belief
from foveate.rounding.descent import belief as belief
from foveate.rounding.descent import beyond as beyond
from foveate.rounding.descent import freedom as freedom
from foveate.rounding.descent import with_descent as with_descent
from foveate.rounding.nearest import Rounded as Rounded
from foveate.rounding.nearest import round_weight as round_weight
