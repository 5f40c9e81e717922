"""The benchmarks that measure a machine. They need no data, no training and no library to compare with.

    kernels  the product of one layer, compared with the memory's bandwidth and with torch's dense layers
    switch   a change of precision of every layer of a model while it runs
    load     the bytes read and the memory taken by loading a model at a precision
    decode   a whole model, token by token
    saved    packing and unpacking the tensors that autograd saves
    inputs   what it costs that each input chooses its precision

Each benchmark returns one object that can be written as JSON:

    {"name", "figures": {name: number}, "machine", "versions", "date", "rounds": raw data, "notes": [sentences]}

A figure that compares two times is a ratio of measurements from the same round, one right after the other, so that a
slow period of the machine affects both. A benchmark is imported when it runs, and only then are its further packages
needed. Quality on real models, training, and comparisons with other libraries are in the folder `benchmarks/` of the
repository, which is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foveate.bench.result import finished
from foveate.errors import FoveateError

NAMES = ("kernels", "switch", "load", "decode", "saved", "inputs")


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
