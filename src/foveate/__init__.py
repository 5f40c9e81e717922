"""foveate: adaptive precision for PyTorch.

A weight is stored once as bit planes, most significant first; its precision is how many planes are read.

    profile = fv.quantize(model, batches)
    plan = fv.allocate(profile, fv.Budget(bits=4.25))
    fv.apply(model, plan)
"""

from foveate.activations.cache import quantized_cache as quantized_cache
from foveate.activations.callback import CompressActivations as CompressActivations
from foveate.activations.compress import compress_activations as compress_activations
from foveate.activations.metric import Relative as Relative
from foveate.activations.policy import Granularity as Granularity
from foveate.activations.report import SavedReport as SavedReport
from foveate.activations.settings import ActivationOptions as ActivationOptions
from foveate.activations.store import ActivationStore as ActivationStore
from foveate.allocate import Constraints as Constraints
from foveate.allocate import allocate as allocate
from foveate.allocate import frontier as frontier
from foveate.allocate import variance_proxy as variance_proxy
from foveate.allocate.cache import CacheProfile as CacheProfile
from foveate.audit import Audit as Audit
from foveate.audit import Perturbation as Perturbation
from foveate.audit import audit as audit
from foveate.checkpoint import Head as Head
from foveate.checkpoint import load_profile as load_profile
from foveate.checkpoint import read_head as read_head
from foveate.checkpoint import save_map as save_map
from foveate.collect.objectives import Embedding as Embedding
from foveate.collect.objectives import Logits as Logits
from foveate.collect.objectives import Objective as Objective
from foveate.errors import BudgetError as BudgetError
from foveate.errors import CheckpointError as CheckpointError
from foveate.errors import DataError as DataError
from foveate.errors import FoveateError as FoveateError
from foveate.errors import LevelError as LevelError
from foveate.errors import MissingExtraError as MissingExtraError
from foveate.errors import PlaneNotResidentError as PlaneNotResidentError
from foveate.errors import SiteError as SiteError
from foveate.errors import StateError as StateError
from foveate.errors import WeightError as WeightError
from foveate.fit_to_loss import fit_to_loss as fit_to_loss
from foveate.inputs import watch_inputs as watch_inputs
from foveate.kernels.dispatch import backends as backends
from foveate.maps import Budget as Budget
from foveate.maps import Frontier as Frontier
from foveate.maps import PrecisionMap as PrecisionMap
from foveate.maps import Profile as Profile
from foveate.maps import Site as Site
from foveate.maps import uniform_of_bytes as uniform_of_bytes
from foveate.nn.cache import calibrate_cache as calibrate_cache
from foveate.nn.dequantize import dequantize as dequantize
from foveate.nn.fold import fold_batchnorm as fold_batchnorm
from foveate.nn.persist import load as load
from foveate.nn.persist import save as save
from foveate.nn.quantize import quantize as quantize
from foveate.nn.registry import apply as apply
from foveate.nn.registry import current_map as current_map
from foveate.nn.registry import profile_of as profile_of
from foveate.nn.registry import use_static_scales as use_static_scales
from foveate.nn.smooth import Smoothed as Smoothed
from foveate.nn.smooth import smooth as smooth
from foveate.verify import Outcome as Outcome
from foveate.verify import Verification as Verification
from foveate.verify import measure as measure
from foveate.verify import verify as verify
from foveate.version import __version__ as __version__
