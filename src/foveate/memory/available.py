"""free_memory: how many bytes this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take without swapping: the machine's, or fewer where a control group limits it.

    A container sees the memory of its whole machine and is killed at its group's limit. Of what the group holds, pages
    of files that were not used lately are given up first, so they count as free, as in `docker stats`.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.

    Args:
        root: where `proc` and `sys` are.
    """
    available: int = psutil.virtual_memory().available
    return min([available, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> list[int]:
    """Bytes that each control group around this process has left; none where there are no such groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = mount / path.lstrip("/")
        # in a container the path may be the host's, and the mount is the container's own group
        groups = [inner, *inner.parents] if inner.is_dir() else [mount]
        found += [
            left for group in groups if group.is_relative_to(mount) and (left := _left(group, *names)) is not None
        ]
    return found


def _left(group: Path, most: str, current: str, inactive: str) -> int | None:
    """Bytes up to a group's limit; None where it has none."""
    try:
        limit, used = int((group / most).read_text()), int((group / current).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no number; the root group has no such files
        return None
    return max(0, limit - used + int(stat.get(inactive, 0)))
