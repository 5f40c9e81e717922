"""The result of a benchmark: its figures, and the machine, the date and the versions of the measurement."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from foveate.kernels.backends.table import backends

#: The processor features that decide which kernels run and how fast.
FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Measured:
    """What a benchmark measured.

    Attributes:
        figures: name -> number.
        rounds: the raw data the figures come from, one dictionary a round.
        notes: sentences that a reader of the figures should know.
    """

    figures: Mapping[str, float]
    rounds: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = field(default=())


class BackgroundLoad:
    """The share of the processors' time that other work took during a `with` block.

    Attributes:
        others: the share that other processes took, 0 to 1.
        stolen: the share that the host of a virtual machine took (steal time).
    """

    others = 0.0
    stolen = 0.0

    def __enter__(self) -> BackgroundLoad:
        self._before = self._times()
        return self

    def __exit__(self, *_: object) -> None:
        own, used, stolen, every = (now - then for now, then in zip(self._times(), self._before, strict=True))
        if every > 0:
            self.others = max(0.0, used - own) / every
            self.stolen = stolen / every

    @staticmethod
    def _times() -> tuple[float, float, float, float]:
        """Accumulated seconds: this process with its finished children, all processes, steal time, all states."""
        machine, process = psutil.cpu_times(), psutil.Process().cpu_times()
        own = process.user + process.system + process.children_user + process.children_system
        used, stolen = machine.user + machine.system, getattr(machine, "steal", 0.0)
        return own, used, stolen, used + stolen + machine.idle + getattr(machine, "iowait", 0.0)

    def note(self) -> str:
        """The shares in a sentence."""
        return f"other processes had {self.others:.1%} of the processors' time, the host kept {self.stolen:.1%} back"


def finished(name: str, measured: Measured) -> dict[str, Any]:
    """The JSON-able object of a benchmark."""
    return {
        "name": name,
        "figures": {key: float(value) for key, value in measured.figures.items()},
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": [dict(r) for r in measured.rounds],
        "notes": list(measured.notes),
    }


def _line_of(path: str, key: str) -> str | None:
    """The value of the first line `key : value` in a file of the operating system's kernel, or None."""
    file = Path(path)
    if not file.exists():
        return None
    for line in file.read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None


def machine() -> dict[str, Any]:
    """The processor and its instructions, cores, threads in use, memory in bytes, huge pages, operating system."""
    known = (_line_of("/proc/cpuinfo", "flags") or _line_of("/proc/cpuinfo", "Features") or "").split()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": _line_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "flags": [f for f in FLAGS if f in known],
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "transparent_hugepage": pages.read_text().strip() if pages.exists() else "unknown",
        "os": platform.platform(),
        "load_average": [round(v, 2) for v in psutil.getloadavg()],
    }


def versions() -> dict[str, str]:
    """The versions of Python, torch, transformers and foveate, and the name of the kernels in use."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "foveate"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["kernels"] = next(b.name for b in backends() if b.runs)
    return found
