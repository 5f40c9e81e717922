"""Benchmarks for developers: quality on real models, real trainings, and comparisons with other libraries.

    quality          models/ at every level, and allocated      quality/levels.py
    inputs           inputs that choose their precision         quality/inputs.py
    cascade          classifiers that read twice where needed   quality/cascade.py
    input-levels     levels of inputs, and inputs that drift    quality/input_levels.py
    cache            packed key/value caches                    quality/cache.py
    activations      compressed activations in real training    training/
    peers            one layer beside other libraries'          peers/speed/linear_layers.py
    decode_peers     a whole model beside llama.cpp             peers/speed/decode.py
    equal_quality    the same at equal quality, real weights    peers/equal_quality/compare.py
    quantizing_peers what quantizing takes, beside others       peers/quantizing/compare.py
    architectures    families of models: works, partly, or refused   architectures/
    quality_peers    other libraries' rounding at equal bytes   peers/quality/

`python -m benchmarks NAME --out FILE` runs one of them in the repository's environment. It also runs the benchmarks of
the wheel under their own names; `foveate.bench` has them, and says what a benchmark returns. None of this is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foveate import bench
from foveate.bench.shared.result import finished
from foveate.errors import FoveateError

#: The module of each benchmark, whose `measure` runs it; those of the wheel come first.
MODULES = {
    **{name: f"foveate.bench.{name}" for name in bench.NAMES},
    "quality": "benchmarks.quality.levels",
    "inputs": "benchmarks.quality.inputs",
    "cascade": "benchmarks.quality.cascade",
    "input-levels": "benchmarks.quality.input_levels",
    "cache": "benchmarks.quality.cache",
    "activations": "benchmarks.training.activations",
    "peers": "benchmarks.peers.speed.linear_layers",
    "decode_peers": "benchmarks.peers.speed.decode",
    "equal_quality": "benchmarks.peers.equal_quality.compare",
    "quantizing_peers": "benchmarks.peers.quantizing.compare",
    "architectures": "benchmarks.architectures",
    "quality_peers": "benchmarks.peers.quality.compare",
}
NAMES = tuple(MODULES)


def run(name: str, **options: Any) -> dict[str, Any]:
    """Run one benchmark with its default sizes.

    Args:
        name: one of `NAMES`.
        options: the arguments of the benchmark's `measure`: `parts` and `share` for activations.

    Returns:
        The object that `foveate.bench` describes.

    Raises:
        FoveateError: there is no such benchmark.
        MissingExtraError: it needs a package that is not installed; the message says what to install.
    """
    if name not in MODULES:
        raise FoveateError(f"benchmark (={name!r}) is not one of {', '.join(NAMES)}")
    return finished(name, import_module(MODULES[name]).measure(**options))
