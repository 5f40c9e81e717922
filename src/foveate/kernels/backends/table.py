"""The backends of each device: which one runs the ops there, and why the others do not.

One table: a device has a function that says what there is for it. A new backend is an entry here and a folder beside
`cpu/`. On the CPU the compiled kernels run. They are built on first use; where they cannot be built, the reference runs
in their place, and a warning says so once. A device without a backend is refused by the ops (kernels/library.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

from foveate.kernels.backends.cpu import library as cpu
from foveate.kernels.collect import ops as collect_ops  # noqa: F401  importing them defines the ops
from foveate.kernels.convert import ops as convert_ops  # noqa: F401
from foveate.kernels.decoder import ops as decoder_ops  # noqa: F401
from foveate.kernels.planes import choice as choice_ops  # noqa: F401
from foveate.kernels.planes import generations as generation_ops  # noqa: F401
from foveate.kernels.planes import ops as plane_ops  # noqa: F401
from foveate.kernels.rounding import ops as rounding_ops  # noqa: F401
from foveate.kernels.saved import ops as saved_ops  # noqa: F401


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to run the ops on one device.

    Attributes:
        device: the type of the device, as torch names it: `cpu`, `cuda`.
        name: `cpu:avx512_vnni`, `cpu:avx2`, `cpu:portable`, `reference`, or `none`: the ops refuse the device.
        runs: whether it is the one in use on the device.
        reason: why, in a sentence.
    """

    device: str
    name: str
    runs: bool
    reason: str


@cache
def ensure_loaded() -> cpu.Status:
    """Build or load the compiled kernels, once a process."""
    return cpu.load()


def _on_cpu() -> tuple[Backend, ...]:
    status = ensure_loaded()
    name = f"cpu:{status.isa}" if status.isa else "cpu"
    compiled = Backend(device="cpu", name=name, runs=status.isa is not None, reason=status.reason)
    meaning = "plain torch, the meaning of every op; runs on a CPU for which no kernels could be compiled"
    return compiled, Backend(device="cpu", name="reference", runs=status.isa is None, reason=meaning)


def _without_backend(device: str) -> tuple[Backend, ...]:
    reason = f"foveate has no kernels for {device} yet; its ops refuse tensors there"
    return (Backend(device=device, name="none", runs=False, reason=reason),)


# What there is for a device, best first. Devices that are not here have no backend either.
TABLE: Mapping[str, Callable[[], tuple[Backend, ...]]] = {
    "cpu": _on_cpu,
    **{device: partial(_without_backend, device) for device in ("cuda", "mps", "xpu")},
}


def backends() -> tuple[Backend, ...]:
    """The backends of each device: which one runs the ops there, and why the others do not.

    Returns:
        For each device of the table, what there is for it. At most one backend of a device runs.
    """
    return tuple(backend for of_device in TABLE.values() for backend in of_device())
