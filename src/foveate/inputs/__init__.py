"""Inputs while a model runs: whether they are still what calibration saw, and the precision they get."""

from foveate.inputs.drift import Tolerance as Tolerance
from foveate.inputs.watch import Change as Change
from foveate.inputs.watch import InputWatch as InputWatch
from foveate.inputs.watch import watch_inputs as watch_inputs
