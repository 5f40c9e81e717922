"""The runtime precision manager: sensors, a pure controller, and what moves a live model along a frontier."""

from foveate.runtime.limits import Limits as Limits
from foveate.runtime.manager import RuntimeManager as RuntimeManager
from foveate.runtime.options import ManagerOptions as ManagerOptions
from foveate.runtime.policy import Costs as Costs
from foveate.runtime.policy import Policy as Policy
from foveate.runtime.readings import Sensor as Sensor
from foveate.runtime.records import replay as replay
from foveate.runtime.site_control import SiteControl as SiteControl
