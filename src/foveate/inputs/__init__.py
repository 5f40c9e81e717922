"""Inputs of a live model: detection of drift from the calibration data, and a higher precision where they drift."""

from foveate.inputs.drift import Tolerance as Tolerance
from foveate.inputs.watch import Change as Change
from foveate.inputs.watch import InputWatch as InputWatch
from foveate.inputs.watch import watch_inputs as watch_inputs
