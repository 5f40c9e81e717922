"""Task profiles: files that survive a kill and refuse damage, and shares that follow the task."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import CheckpointError, DataError
from foveate.importance.tags import TileTags, load_tags, save_tags, tags_of, zero_share, zones
from foveate.importance.tasks import Sharing, TaskProfile, load_task, save_task, start_shares, update_shares
from frontiers import random_profile


def _task(value: float = 1.0) -> TaskProfile:
    return TaskProfile(
        name="code", means={"a:weight": torch.full((1, 300), value), "b:weight": torch.ones(5, 1)}, tokens=7
    )


def test_a_task_comes_back_as_it_was(tmp_path: Path) -> None:
    save_task(tmp_path / "code.safetensors", _task(0.25))
    found = load_task(tmp_path / "code.safetensors")
    assert (found.name, found.tokens) == ("code", 7)
    for name, mean in _task(0.25).means.items():
        assert torch.equal(found.means[name], mean.double())


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "task"
    save_task(path, _task())
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(CheckpointError):
            load_task(path)
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        load_task(path)
    save_tags(path, {})
    with pytest.raises(CheckpointError, match="not a task profile"):
        load_task(path)
    with pytest.raises(FileNotFoundError):
        load_task(tmp_path / "absent")


def test_a_kill_leaves_the_last_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "task"
    save_task(path, _task(0.0))
    code = f"""
        import torch
        from foveate.importance.tasks import TaskProfile, save_task
        print("ready", flush=True)
        value = 0.0
        while True:
            value += 1
            means = {{"a:weight": torch.full((1, 20000), value)}}
            save_task({str(path)!r}, TaskProfile(name="code", means=means, tokens=int(value)))
            print(int(value), flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while child.stdout.readline().strip() != "3":
        assert child.poll() is None
    time.sleep(0.013)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    found = load_task(path)
    assert found.tokens >= 3
    assert bool((found.means["a:weight"] == found.tokens).all())


def test_a_task_that_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match="not a finite table"):
        TaskProfile(name="x", means={"w": torch.tensor([[math.nan]])}, tokens=1)
    with pytest.raises(DataError, match=r"name \(=''\)"):
        TaskProfile(name="", means={}, tokens=1)
    with pytest.raises(DataError, match=r"tokens \(=-1\)"):
        TaskProfile(name="x", means={}, tokens=-1)


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=True, width=32), max_size=3), max_size=10),
    st.floats(0.01, 1.0),
)
def test_shares_stay_positive_and_sum_to_one(losses: list[dict[str, float]], switch: float) -> None:
    shares = start_shares(("a", "b", "c"))
    for one in losses:
        shares = update_shares(shares, one, Sharing(switch=switch))
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) >= switch / 3 * 0.999


def test_shares_follow_the_task_and_return_soon() -> None:
    shares = start_shares(("a", "b"))
    for _ in range(50):
        shares = update_shares(shares, {"a": 0.01, "b": 0.02}, Sharing())
    assert shares["a"] > 0.9
    steps = 0
    while shares["b"] < shares["a"]:
        shares = update_shares(shares, {"a": 0.02, "b": 0.01}, Sharing())
        steps += 1
    assert steps <= 3
    with pytest.raises(DataError, match=r"rate \(=0\)"):
        Sharing(rate=0)
    with pytest.raises(DataError, match=r"switch \(=2\)"):
        Sharing(switch=2)


def test_tags_are_those_of_the_map_and_come_back_from_a_file(tmp_path: Path) -> None:
    profile = random_profile(0)
    site = profile.weight_sites()[0]
    plan = profile.uniform(4).with_level("layer1:weight", 0)
    ratios = {s.name: torch.full((s.tiles,), 2.0, dtype=torch.float64) for s in profile.weight_sites()}
    tags = tags_of(plan, profile, ratios)
    assert tags[site.name].level.shape == site.grid
    assert bool((tags[site.name].level == 4).all())
    torch.testing.assert_close(tags[site.name].importance.flatten(), 2 * profile.losses[site.name][:, 0])
    assert bool(tags["layer1:weight"].zero.all())
    assert not bool(tags[site.name].zero.any())
    save_tags(tmp_path / "tags", tags)
    found = load_tags(tmp_path / "tags", profile.sites)
    for name, one in tags.items():
        assert torch.equal(found[name].level, one.level)
        assert torch.equal(found[name].importance, one.importance)
    with pytest.raises(CheckpointError, match="another model"):
        load_tags(tmp_path / "tags", random_profile(0, ((16, 32, 32),)).sites)
    save_tags(tmp_path / "tags", {**tags, site.name: TileTags(level=torch.zeros(1, 1), importance=torch.zeros(1, 1))})
    with pytest.raises(CheckpointError, match="damaged"):
        load_tags(tmp_path / "tags", profile.sites)


def test_zones_are_the_runs_of_one_level() -> None:
    profile = random_profile(0)
    site = profile.weight_sites()[0]
    levels = bytes([4, 4, 2] + [0] * (site.tiles - 3))
    plan = profile.uniform(8)
    plan = type(plan)(plan.sites, {**plan.levels, site.name: levels}, plan.other_bytes)
    own = [(zone.level, zone.start, zone.stop) for zone in zones(plan) if zone.site == site.name]
    assert own == [(4, 0, 2), (2, 2, 3), (0, 3, site.tiles)]
    weights = sum(s.tiles * 16 * s.group for s in profile.weight_sites())
    assert zero_share(plan) == pytest.approx((site.tiles - 3) * 16 * site.group / weights)
