"""Inputs of a live model: each chooses its precision, and is read at a higher one where it drifts from calibration."""

from foveate.inputs.adapt import AdaptOptions as AdaptOptions
from foveate.inputs.adapt import adapt_to_input as adapt_to_input
from foveate.inputs.cascading import Cascade as Cascade
from foveate.inputs.cascading import CascadeVerdict as CascadeVerdict
from foveate.inputs.cascading import cascade as cascade
from foveate.inputs.drift import Tolerance as Tolerance
from foveate.inputs.explain import Explanation as Explanation
from foveate.inputs.explain import explain as explain
from foveate.inputs.input_adaptation import InputAdaptation as InputAdaptation
from foveate.inputs.input_adaptation import Tally as Tally
from foveate.inputs.verdict import Verdict as Verdict
from foveate.inputs.watch import Change as Change
from foveate.inputs.watch import InputWatch as InputWatch
from foveate.inputs.watch import watch_inputs as watch_inputs
