"""The benchmarks that measure a machine. They need no training and no other library; only `runtime` needs data.

    kernels  the product of one layer, compared with the memory's bandwidth and with torch's dense layers
    switch   a change of precision of every layer of a model while it runs
    load     the bytes read and the memory taken by loading a model at a precision
    decode   a whole model, token by token
    calibrate  quantizing: its time by phase over that of forward passes, and its memory over that of the model
    saved    packing and unpacking the tensors that autograd saves
    inputs   what it costs that each input chooses its precision
    runtime  the runtime manager: simulated under load on recorded traces, and live around a plain loop
    serve    the server's engine: tokens a second under too much load, and what a step costs beside the model
    memory   planes that come and go: memory given back, the limit, restoring, streaming, conversions

Two more train small models on texts, minutes of work that are kept for the next time, and need `FOVEATE_DATA`:

    importance  a mixture of experts that follows its task, beside static maps of equal bytes
    trace    an hour of recorded requests on one server, compressed: with every decider, and held at its best map

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

from foveate.bench.shared.result import finished
from foveate.errors import FoveateError

NAMES = (
    "kernels",
    "switch",
    "load",
    "decode",
    "calibrate",
    "saved",
    "runtime",
    "memory",
    "serve",
    "inputs",
    "importance",
    "trace",
)


def run(name: str, sizes: Any = None) -> dict[str, Any]:
    """Run one benchmark.

    Args:
        name: one of `NAMES`.
        sizes: how much is measured, a value of the benchmark's own class `Sizes` where it has one; its default if None.

    Returns:
        The object described at the head of this file.

    Raises:
        FoveateError: there is no such benchmark.
        MissingExtraError: it needs a package that is not installed; the message says what to install.
    """
    if name not in NAMES:
        raise FoveateError(f"benchmark (={name!r}) is not one of {', '.join(NAMES)}")
    module = import_module(f"foveate.bench.{name}")
    return finished(name, module.measure() if sizes is None else module.measure(sizes))
