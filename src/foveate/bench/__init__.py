"""The benchmarks that judge a machine: they need no data, no other library and no training.

    kernels  one layer's product, beside the memory's bandwidth and torch's dense layers
    switch   another precision for every layer of a model while it runs
    load     bytes read and memory taken by loading at a precision
    decode   a whole model, token by token
    saved    packing and unpacking what autograd saves

Each measures one promise and gives one JSON-able object.

    {"name", "figures": {name: number}, "machine", "versions", "date", "rounds": raw data, "notes": [sentences]}

Every figure that compares times is a ratio of two things measured in the same rounds, one after the other, so that a
machine that is slow today is slow for both. Benchmarks are imported when they run: what they need beyond torch is
asked for then. Quality on real models, training, and comparisons with other libraries are in the repository's folder
`benchmarks/`, outside of what is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foveate.bench.result import finished
from foveate.errors import FoveateError

NAMES = ("kernels", "switch", "load", "decode", "saved")


def run(name: str) -> dict[str, Any]:
    """Run one benchmark with its default sizes.

    Args:
        name: one of `NAMES`.

    Returns:
        The object described at the head of this file.

    Raises:
        FoveateError: there is no such benchmark.
        MissingExtraError: it needs a package that is not installed; the message says what to install.
    """
    if name not in NAMES:
        raise FoveateError(f"benchmark (={name!r}) is not one of {', '.join(NAMES)}")
    return finished(name, import_module(f"foveate.bench.{name}").measure())
