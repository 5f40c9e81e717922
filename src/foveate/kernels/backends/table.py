"""Which kernels run, and why the others do not.

The compiled kernels are built on first use. Where they cannot be, the reference runs: a warning says so once and
`backends()` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from foveate.kernels.backends.cpu import library as cpu


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    Attributes:
        name: `cpu:avx512_vnni`, `cpu:avx2`, `cpu:portable` or `reference`.
        runs: whether it is the one in use.
        reason: why, in a sentence.
    """

    name: str
    runs: bool
    reason: str


@cache
def ensure_loaded() -> cpu.Status:
    """Build or load the compiled kernels, once a process."""
    return cpu.load()


def backends() -> tuple[Backend, ...]:
    """The backends of the plane ops on the CPU: which one runs, and why the others do not."""
    status = ensure_loaded()
    compiled = Backend(f"cpu:{status.isa}" if status.isa else "cpu", status.isa is not None, status.reason)
    reference = Backend(
        "reference", status.isa is None, "plain torch, the meaning of every op; runs where no kernel was compiled"
    )
    return compiled, reference
