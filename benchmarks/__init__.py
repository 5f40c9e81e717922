"""What only developers run: quality on real models, real trainings, and comparisons with other libraries.

    quality          models/ at every level, and allocated      quality/levels.py
    inputs           levels of inputs, and inputs that drift    quality/inputs.py
    cache            packed key/value caches                    quality/cache.py
    activations      compressed activations in real training    training/
    peers            one layer beside other libraries'          peers/speed/linear_layers.py
    decode_peers     a whole model beside llama.cpp             peers/speed/decode.py
    architectures    families of models: works, partly, or refused   architectures/
    quality_peers    other libraries' rounding at equal bytes   peers/quality/

`python -m benchmarks NAME --out FILE` runs one in the repository's environment, and those of the wheel
(`foveate.bench`, which also says what a benchmark gives back) under their own names. None of this is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foveate import bench
from foveate.bench.result import finished
from foveate.errors import FoveateError

#: The modules of benchmarks, whose `measure` runs them; those of the wheel first.
MODULES = {
    **{name: f"foveate.bench.{name}" for name in bench.NAMES},
    "quality": "benchmarks.quality.levels",
    "inputs": "benchmarks.quality.inputs",
    "cache": "benchmarks.quality.cache",
    "activations": "benchmarks.training.activations",
    "peers": "benchmarks.peers.speed.linear_layers",
    "decode_peers": "benchmarks.peers.speed.decode",
    "architectures": "benchmarks.architectures",
    "quality_peers": "benchmarks.peers.quality.compare",
}
NAMES = tuple(MODULES)


def run(name: str, **options: Any) -> dict[str, Any]:
    """Run one benchmark with its default sizes.

    Args:
        name: one of `NAMES`.
        options: of activations, `parts` and `share`; see its `measure`.

    Returns:
        The object that `foveate.bench` describes.

    Raises:
        FoveateError: there is no such benchmark.
        MissingExtraError: it needs a package that is not installed; the message says what to install.
    """
    if name not in MODULES:
        raise FoveateError(f"benchmark (={name!r}) is not one of {', '.join(NAMES)}")
    return finished(name, import_module(MODULES[name]).measure(**options))
