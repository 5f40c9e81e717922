"""The name of the machine that times were measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def machine_name() -> str:
    """The processor and the number of threads that torch computes with, such as `Intel(R) Xeon(R), 2 threads`."""
    name = _cpu() or platform.processor() or platform.machine() or "unknown processor"
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'s' * (count != 1)}"


def _cpu(file: Path = Path("/proc/cpuinfo")) -> str:
    """The model name in a file of the operating system's kernel; empty where there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
