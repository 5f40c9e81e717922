"""A seeded slice of what `make fuzz` runs."""

from __future__ import annotations

import files
import heads
import saves


def test_heads_with_valid_checksums() -> None:
    for name, watch in heads.fuzz(600, 30).items():
        assert not watch.faults, name
        assert watch.refused > 10, name


def test_tensors_and_side_files() -> None:
    for name, watch in files.fuzz(300).items():
        assert not watch.faults, name
        assert watch.refused > 10, name


def test_processes_and_threads_at_one_folder() -> None:
    found = saves.fuzz(8, 2)
    assert all(said.endswith(": good") or not count for said, count in found.items()), found
    assert found["save: good"] > 3
    assert found["load: good"] > 8
