"""The processes that `torchrun -m foveate quantize` starts, and how they share a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

log = logging.getLogger("foveate")
#: One process may round its weights for long while another waits. torchrun ends all of them when one fails.
_PATIENCE = timedelta(days=7)


@contextmanager
def shared_by_torchrun() -> Iterator[None]:
    """While this is open, the processes that torchrun has started are a group; without torchrun nothing happens.

    Only the first of them prints, but each its own errors. torchrun gives each process one thread unless
    `OMP_NUM_THREADS` is set; here they share the cores of their machine instead.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if here > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // here))
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        if dist.get_rank():
            log.setLevel(logging.ERROR)
        else:
            count = dist.get_world_size()
            log.info("calibration is shared by %d process%s", count, "" if count == 1 else "es")
        yield
    finally:
        dist.destroy_process_group()


def processes() -> dist.ProcessGroup | None:
    """The group of all processes that torchrun has started; None if it did not start this one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    group = processes()
    return group is None or dist.get_rank(group) == 0
