"""The benchmarks: each measures one promise and gives one JSON-able object.

    {"name", "figures": {name: number}, "machine", "versions", "date", "rounds": raw data, "notes": [sentences]}

Every figure that compares times is a ratio of two things measured in the same rounds, one after the other, so that a
machine that is slow today is slow for both. Benchmarks are imported when they run: what they need beyond torch is
asked for then.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foveate.bench.result import as_table as as_table
from foveate.bench.result import finished
from foveate.errors import FoveateError

NAMES = (
    "kernels",
    "switch",
    "load",
    "quality",
    "inputs",
    "decode",
    "cache",
    "peers",
    "saved",
    "activations",
    "architectures",
)


def run(name: str, peers: bool = False, **options: Any) -> dict[str, Any]:
    """Run one benchmark with its default sizes.

    Args:
        name: one of `NAMES`.
        peers: of quality, whether to measure other libraries beside ours at equal bytes instead.
        options: of activations, `parts` and `share`; see its `measure`.

    Returns:
        The object described at the head of this file.

    Raises:
        FoveateError: there is no such benchmark, or it has no peers.
        MissingExtraError: it needs a package that is not installed; the message says what to install.
    """
    if name not in NAMES:
        raise FoveateError(f"benchmark (={name!r}) is not one of {', '.join(NAMES)}")
    if peers and name != "quality":
        raise FoveateError(f"peers of {name}: only quality is measured beside other libraries on request")
    if options and name != "activations":
        raise FoveateError(f"{name} has no parts and no share: only activations has")
    module = "quality_peers" if peers else name
    return finished(module, import_module(f"foveate.bench.{module}").measure(**options))
