"""foveate: adaptive precision for PyTorch.

A weight is stored once as bit planes, most significant first; its precision is how many planes are read.

    profile = fv.quantize(model, batches)
    plan = fv.allocate(profile, fv.Budget(bits=4.25))
    fv.apply(model, plan)
"""

from foveate.activations.callback import CompressActivations as CompressActivations
from foveate.activations.compress import compress_activations as compress_activations
from foveate.activations.measure.metric import Relative as Relative
from foveate.activations.policy.choose import Granularity as Granularity
from foveate.activations.policy.options import ActivationOptions as ActivationOptions
from foveate.activations.report import SavedReport as SavedReport
from foveate.activations.store import ActivationStore as ActivationStore
from foveate.allocate import Constraints as Constraints
from foveate.allocate import allocate as allocate
from foveate.allocate import frontier as frontier
from foveate.allocate import variance_proxy as variance_proxy
from foveate.calibrate.dequantize import dequantize as dequantize
from foveate.calibrate.quantize import quantize as quantize
from foveate.checkpoint import Head as Head
from foveate.checkpoint import load_frontier as load_frontier
from foveate.checkpoint import load_profile as load_profile
from foveate.checkpoint import read_head as read_head
from foveate.checkpoint import save_frontier as save_frontier
from foveate.checkpoint import save_map as save_map
from foveate.checkpoint import save_timings as save_timings
from foveate.collect.objectives import Embedding as Embedding
from foveate.collect.objectives import Logits as Logits
from foveate.collect.objectives import Objective as Objective
from foveate.errors import BudgetError as BudgetError
from foveate.errors import CheckpointError as CheckpointError
from foveate.errors import DataError as DataError
from foveate.errors import DeviceError as DeviceError
from foveate.errors import FloorError as FloorError
from foveate.errors import FoveateError as FoveateError
from foveate.errors import LevelError as LevelError
from foveate.errors import MissingExtraError as MissingExtraError
from foveate.errors import PlaneNotResidentError as PlaneNotResidentError
from foveate.errors import SiteError as SiteError
from foveate.errors import StateError as StateError
from foveate.errors import WeightError as WeightError
from foveate.evaluate.audit import Audit as Audit
from foveate.evaluate.audit import Perturbation as Perturbation
from foveate.evaluate.audit import audit as audit
from foveate.evaluate.fit_to_loss import fit_to_loss as fit_to_loss
from foveate.evaluate.measured_frontier import measure_frontier as measure_frontier
from foveate.evaluate.timings import measure_timings as measure_timings
from foveate.evaluate.verify import Outcome as Outcome
from foveate.evaluate.verify import Verification as Verification
from foveate.evaluate.verify import measure as measure
from foveate.evaluate.verify import verify as verify
from foveate.folder.known_frontier import frontier_of as frontier_of
from foveate.folder.load import load as load
from foveate.folder.save import save as save
from foveate.inputs import adapt_to_input as adapt_to_input
from foveate.inputs import explain as explain
from foveate.inputs import watch_inputs as watch_inputs
from foveate.kernels.backends.table import backends as backends
from foveate.kvcache.cache import quantized_cache as quantized_cache
from foveate.kvcache.calibrate import calibrate_cache as calibrate_cache
from foveate.kvcache.profile import CacheProfile as CacheProfile
from foveate.nn.levels import apply as apply
from foveate.nn.levels import current_map as current_map
from foveate.nn.levels import floor as floor
from foveate.nn.levels import row_precision as row_precision
from foveate.nn.levels import set_index as set_index
from foveate.nn.levels import state_of as state_of
from foveate.nn.levels import use_static_scales as use_static_scales
from foveate.nn.levels import withdraw as withdraw
from foveate.nn.registry import profile_of as profile_of
from foveate.precision.budgets import Budget as Budget
from foveate.precision.frontiers import Frontier as Frontier
from foveate.precision.frontiers import Point as Point
from foveate.precision.maps import PrecisionMap as PrecisionMap
from foveate.precision.maps import Site as Site
from foveate.precision.maps import uniform_of_bytes as uniform_of_bytes
from foveate.precision.profiles import Profile as Profile
from foveate.precision.state import Floor as Floor
from foveate.precision.state import LevelState as LevelState
from foveate.precision.state import Request as Request
from foveate.precision.timings import Timings as Timings
from foveate.prepare.fold import fold_batchnorm as fold_batchnorm
from foveate.prepare.smooth import Smoothed as Smoothed
from foveate.prepare.smooth import smooth as smooth
from foveate.version import __version__ as __version__
