"""Rolling importance: a live model's bits follow its task, for the same bytes (patent 10846621)."""

from foveate.importance.chains import Thresholds as Thresholds
from foveate.importance.moves import Caution as Caution
from foveate.importance.options import PATENT as PATENT
from foveate.importance.options import Shadow as Shadow
from foveate.importance.options import TrackingOptions as TrackingOptions
from foveate.importance.rolling import Decay as Decay
from foveate.importance.tags import TileTags as TileTags
from foveate.importance.tags import Zone as Zone
from foveate.importance.tags import load_tags as load_tags
from foveate.importance.tags import save_tags as save_tags
from foveate.importance.tags import zones as zones
from foveate.importance.tasks import TaskProfile as TaskProfile
from foveate.importance.tasks import load_task as load_task
from foveate.importance.tasks import save_task as save_task
from foveate.importance.track import importance_of as importance_of
from foveate.importance.track import track_importance as track_importance
from foveate.importance.tracker import ImportanceTracker as ImportanceTracker
from foveate.importance.verdict import Decision as Decision
from foveate.importance.verdict import Snapshot as Snapshot
from foveate.importance.verdict import Verdict as Verdict
from foveate.importance.verdict import heat_map as heat_map
