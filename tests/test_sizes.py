"""Free memory under control groups. Parsing of sizes is tested in precision/test_maps.py."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from foveate.memory.available import free_memory

MIB = 1 << 20


def _group(folder: Path, most: str, current: str, limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / most).write_text(f"{limit}\n")
    (folder / current).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def _process(root: Path, groups: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)


def _second(folder: Path, limit: str, used: int, inactive: int) -> None:
    _group(folder, "memory.max", "memory.current", limit, used, f"anon 5\ninactive_file {inactive}\n")


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    _process(tmp_path, "0::/outer/inner\n")
    mount = tmp_path / "sys/fs/cgroup"
    _second(mount / "outer/inner", "max", 3 * MIB, 0)
    _second(mount / "outer", str(10 * MIB), 8 * MIB, MIB)
    assert free_memory(tmp_path) == 3 * MIB


def test_a_container_that_is_told_its_hosts_path(tmp_path: Path) -> None:
    _process(tmp_path, "0::/system.slice/docker-1.scope\n")
    _second(tmp_path / "sys/fs/cgroup", str(10 * MIB), 9 * MIB, 0)
    assert free_memory(tmp_path) == MIB


def test_first_version(tmp_path: Path) -> None:
    _process(tmp_path, "5:cpu:/a\n4:memory:/a\n0::/a\n")
    folder = tmp_path / "sys/fs/cgroup/memory/a"
    _group(
        folder, "memory.limit_in_bytes", "memory.usage_in_bytes", str(7 * MIB), 9 * MIB, f"total_inactive_file {MIB}\n"
    )
    assert free_memory(tmp_path) == 0  # usage may be past the limit for a moment


@pytest.mark.parametrize("groups", [None, "", "0::/\n", "4:memory:/a\n"])
def test_without_a_limit_it_is_the_machines(tmp_path: Path, groups: str | None) -> None:
    if groups is not None:
        _process(tmp_path, groups)
    assert free_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
