"""The exceptions that foveate raises.

Each derives from `FoveateError` and from the built-in exception that a user of Python would expect. Its message names
the value and the rule: "level (=5) is not one of 0, 2, 3, 4, 6, 8". The command line turns each into one line and exit
code 2.
"""

from __future__ import annotations


class FoveateError(Exception):
    """The base of all exceptions that foveate raises on purpose."""


class LevelError(FoveateError, ValueError):
    """A level that does not exist, or that this site does not have."""


class PlaneNotResidentError(LevelError):
    """A level whose planes are not stored: the model was loaded, or the folder saved, without them."""


class SiteError(FoveateError, KeyError):
    """A site, or a pattern of sites, that the model does not have."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class BudgetError(FoveateError, ValueError):
    """A budget that is malformed, or that no map can meet; the message says the least possible."""


class FloorError(BudgetError):
    """A floor that cannot be met, or that a change would undercut; the message names it."""


class WeightError(FoveateError, ValueError):
    """Weights that cannot be quantized: NaN, Inf, or beyond the range of the stored scales."""


class StateError(FoveateError, RuntimeError):
    """A state_dict that does not fit a model on planes: another geometry or none, or fewer planes than are active."""


class DeviceError(FoveateError, RuntimeError):
    """Tensors on a device that no kernels are for; the message names the device."""


class DataError(FoveateError, ValueError):
    """Calibration or evaluation data that are empty, malformed, or give a loss that is not finite."""


class CheckpointError(FoveateError, OSError):
    """A folder that is missing, truncated, altered, of a newer version, or cannot be written."""


class MissingExtraError(FoveateError, ImportError):
    """A feature that needs an optional dependency; the message says what to install."""


class LostProcessError(FoveateError, RuntimeError):
    """Another process that shares a calibration has ended, or cannot be reached; the message says what torch said."""
