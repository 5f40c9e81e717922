"""A frontier in a folder: what was saved is loaded again, by its bytes, and what is malformed is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from torch import nn

import foveate as fv
from folders import copy_of, mixed, rewrite, skeleton
from foveate.checkpoint.frontier import description_of, table_of
from foveate.errors import BudgetError, CheckpointError, FoveateError, PlaneNotResidentError, SiteError
from foveate.files import checksum
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap, Site
from foveate.precision.timings import Timings
from frontiers import measured, random_profile
from tiny import quantized_mlp


def _chain(profile: fv.Profile, maps: int = 12, points: int = 4) -> Frontier:
    return measured(fv.frontier(profile, maps), points, 7)


@pytest.fixture
def stored(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> tuple[Path, Frontier]:
    folder = copy_of(saved[0], tmp_path / "model")
    chain = _chain(saved[2])
    fv.save_frontier(folder, chain)
    return folder, chain


def _same(a: Frontier, b: Frontier) -> bool:
    predicted = [[plan.predicted_loss for plan in chain] for chain in (a, b)]
    return a == b and predicted[0] == predicted[1]


def test_what_was_saved_is_loaded(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    _, model, profile = saved
    chain = _chain(profile)
    fv.save(model, tmp_path / "a", frontier=chain)
    loaded = fv.load(tmp_path / "a", model=skeleton())
    found = fv.frontier_of(loaded)
    assert _same(found, chain)
    assert found is fv.frontier_of(loaded)
    assert found[0].other_parameters == profile.other_parameters
    assert _same(fv.frontier_of(copy.deepcopy(loaded)), chain)
    # it stays with the model, and with the folder where only the default map changes
    fv.save(loaded, tmp_path / "b")
    fv.save_map(tmp_path / "b", profile.uniform(3))
    assert _same(fv.load_frontier(tmp_path / "b"), chain)
    for index in (0, 5, len(found) - 1):
        fv.apply(loaded, found[index])
        assert fv.current_map(loaded) == chain[index]


def test_a_frontier_is_exchanged_and_taken_away(stored: tuple[Path, Frontier]) -> None:
    folder, chain = stored
    before = fv.read_head(folder)
    fv.save_frontier(folder, chain.unmeasured())
    assert fv.load_frontier(folder) == chain.unmeasured()
    fv.save_frontier(folder, Frontier(chain.maps[:3]))
    assert fv.load_frontier(folder) == Frontier(chain.maps[:3])
    assert not (folder / before.files["frontier"]).exists()
    fv.save_frontier(folder, None)
    with pytest.raises(CheckpointError, match="holds no frontier"):
        fv.load_frontier(folder)
    assert not list(folder.glob("foveate-frontier-*"))
    assert fv.read_head(folder).files == {k: v for k, v in before.files.items() if k != "frontier"}
    with pytest.raises(FoveateError, match="loaded without a frontier"):
        fv.frontier_of(fv.load(folder, model=skeleton()))


def test_a_frontier_that_was_replaced_is_not_read(stored: tuple[Path, Frontier]) -> None:
    folder, chain = stored
    first, second = (fv.load(folder, model=skeleton()) for _ in range(2))
    assert fv.frontier_of(first) == chain
    fv.save_frontier(folder, Frontier(chain.maps[:5]))
    assert fv.frontier_of(first) == chain
    with pytest.raises(CheckpointError, match="its frontier is gone"):
        fv.frontier_of(second)


def test_only_planes_that_are_stored(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    _, model, profile = saved
    chain, keep = _chain(profile), profile.uniform(4)
    with pytest.raises(PlaneNotResidentError, match="at level 8 that are stored up to 4 bits only"):
        fv.save(model, tmp_path / "a", keep=keep, frontier=chain)
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())
    lower = fv.frontier(profile, 6, fv.Constraints(levels=(2, 3, 4)))
    fv.save(model, tmp_path / "a", keep=keep, frontier=lower)
    assert fv.load_frontier(tmp_path / "a") == lower
    with pytest.raises(PlaneNotResidentError, match="at level 8"):
        fv.save_frontier(tmp_path / "a", chain)
    # the model's own frontier is left out where its planes are
    fv.save(model, tmp_path / "b", frontier=chain)
    loaded = fv.load(tmp_path / "b", model=skeleton())
    fv.save(loaded, tmp_path / "c", keep=keep)
    with pytest.raises(CheckpointError, match="holds no frontier"):
        fv.load_frontier(tmp_path / "c")
    other = fv.frontier(quantized_mlp(group=64)[1], 4)
    for store in (
        lambda: fv.save(model, tmp_path / "b", frontier=other),
        lambda: fv.save_frontier(tmp_path / "b", other),
    ):
        with pytest.raises(SiteError, match="of another model"):
            store()
    assert fv.load_frontier(tmp_path / "b") == chain


def test_golden_bytes(tmp_path: Path) -> None:
    """Worked out by hand from docs/format.md: three tiles and one input, three maps."""
    sites = (Site("a:weight", "weight", 48, 32, 32), Site("a:input", "input", 0, 32))
    maps = [
        PrecisionMap(sites, {"a:weight": bytes(levels), "a:input": x}, 0, loss)
        for levels, x, loss in (((8, 8, 6), 16, 0.5), ((8, 4, 0), 8, 1.0), ((2, 4, 0), 8, float("nan")))
    ]
    chain = Frontier(tuple(maps))
    table = table_of(chain)
    assert table["weights"].tolist() == [[3, 3, 1], [2, 3, 1], [2, 3, 1], [2, 1, 1], [2, 1, 0]]
    assert table["inputs"].tolist() == [[3], [3], [1], [0]]
    assert all(tensor.dtype == torch.uint8 for tensor in table.values())
    save_file(table, tmp_path / "table")
    content = (tmp_path / "table").read_bytes()
    assert content.endswith(bytes([3, 3, 1, 0, 3, 3, 1, 2, 3, 1, 2, 3, 1, 2, 1, 1, 2, 1, 0]))
    assert description_of(chain) == {
        "maps": 3, "levels": [2, 3, 4, 6, 8], "input_levels": [4, 8, 16, 32], "predicted_loss": [0.5, 1.0, None],
        "points": [], "unit": "", "machine": "",
    }  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_any_nested_chain_comes_back(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path_factory: pytest.TempPathFactory, seeds: list[int]
) -> None:
    folder, _, profile = saved
    part = copy_of(folder, tmp_path_factory.mktemp("chain") / "model")
    maps = [profile.uniform(8)]
    for seed in seeds:
        lower, before = mixed(profile, seed), maps[-1]
        levels: dict[str, Any] = {
            s.name: bytes(map(min, _tiles(before, s), _tiles(lower, s))) for s in profile.weight_sites()
        }
        inputs: dict[str, Any] = {s.name: min(before.levels[s.name], 4 << seed % 4) for s in profile.input_sites()}
        maps.append(PrecisionMap(profile.sites, {**levels, **inputs}, profile.other_bytes))
    chain = Frontier(tuple(maps))
    fv.save_frontier(part, chain)
    assert fv.load_frontier(part) == chain


def _tiles(plan: PrecisionMap, site: Site) -> bytes:
    levels = plan.levels[site.name]
    return bytes([levels]) * site.tiles if isinstance(levels, int) else levels


def test_the_longest_chain_is_as_large_as_any(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    profile = random_profile(0, [(512, 512, 128)])
    sizes = [sum(t.numel() for t in table_of(fv.frontier(profile, maps)).values()) for maps in (2, 255)]
    assert sizes == [5 * 128 + 4] * 2
    with pytest.raises(BudgetError, match=r"points \(=256\) must be at least 2 and at most 255"):
        fv.frontier(profile, 256)


def _changed(**changes: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, "frontier": {**data["frontier"], **changes}}


def _at_point(**changes: Any) -> Callable[[Any], Any]:
    def change(data: Any) -> Any:
        data["frontier"]["points"][0].update(changes)
        return data

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(maps=0), r"maps \(=0\) is not a number from 1 to 255"),
        (_changed(maps=10**9), "maps"),
        (_changed(maps=11), "predicted_loss has not one entry for each map"),
        (_changed(maps=True), "maps"),
        (_changed(levels=[2, 3, 4, 6, 7]), r"levels \(=\[2, 3, 4, 6, 7\]\) are not some of 2, 3, 4, 6, 8"),
        (_changed(levels=[3, 2, 4, 6, 8]), "in ascending order"),
        (_changed(levels=[2, 3, 4, 6]), "frontier of 'weights' is malformed: 60 bytes, not 48"),
        (_changed(levels=[]), "levels"),
        (_changed(input_levels=None), "levels"),
        (_changed(predicted_loss=[1.0]), "predicted_loss"),
        (_changed(predicted_loss=["x"] * 12), "neither null nor a finite number"),
        (_changed(points=[]), None),
        (_changed(points=[{}]), "malformed"),
        (_changed(points=5), "malformed"),
        (_changed(unit=7), "unit"),
        (_at_point(index=1), "rise from 0 to 11"),
        (_at_point(bytes_read=5), "bits or bytes differ"),
        (_at_point(divergence=float("nan")), "divergence"),
        (_at_point(seconds=-1), "seconds"),
        (_at_point(seconds=None), None),
        (_at_point(more=1), "malformed"),
        (lambda data: {**data, "frontier": []}, "holds no frontier|malformed"),
        (lambda data: {**data, "frontier": [[1]]}, "malformed"),
        (lambda data: {**data, "files": {k: v for k, v in data["files"].items() if k != "frontier"}}, "no frontier"),
    ],
)
def test_descriptions_are_checked(
    stored: tuple[Path, Frontier], change: Callable[[Any], Any], message: str | None
) -> None:
    folder, chain = stored
    rewrite(folder, change)
    if message is None:
        assert fv.load_frontier(folder).maps == chain.maps
        return
    with pytest.raises(CheckpointError, match=message):
        fv.load_frontier(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "weights": t["weights"].flip(0)}, "numbers that rise with the level"),
        (lambda t: {**t, "weights": t["weights"] * 0 + 13}, "numbers above 12"),
        (lambda t: {**t, "weights": t["weights"][:, 1:]}, "weights is"),
        (lambda t: {**t, "weights": t["weights"].short()}, "malformed"),
        (lambda t: {**t, "inputs": t["inputs"] * 0}, "an input has no level"),
        (lambda t: {"weights": t["weights"]}, "lists no 'inputs'"),
        (lambda t: {**t, "weights": torch.zeros(1 << 20, dtype=torch.uint8)}, "malformed: 1,048,576 bytes"),
    ],
)
def test_tables_are_checked(stored: tuple[Path, Frontier], change: Callable[[Any], Any], message: str) -> None:
    folder, _ = stored
    file = folder / fv.read_head(folder).files["frontier"]
    tensors = {key: t.contiguous() for key, t in change(load(file.read_bytes())).items()}
    save_file(tensors, file)

    def signed(data: Any) -> Any:
        data["files"]["frontier"]["sha256"] = {key: checksum(t) for key, t in tensors.items()}
        return data

    rewrite(folder, signed)
    with pytest.raises(CheckpointError, match=message):
        fv.load_frontier(folder)
    fv.load(folder, model=skeleton())  # the model itself is whole


def test_damage_is_seen(stored: tuple[Path, Frontier]) -> None:
    folder, _ = stored
    file = folder / fv.read_head(folder).files["frontier"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        fv.load_frontier(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        fv.load_frontier(folder)


def test_timings_are_stored_with_the_profile(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    model = copy.deepcopy(saved[1])
    timings = fv.measure_timings(model, torch.randn(4, 70), progress=False)
    fv.save(model, tmp_path / "a")
    assert fv.load_profile(tmp_path / "a").timings == timings
    assert fv.load_profile(saved[0]).timings is None
    for wrong in (5, [], {}, {**timings.to_json(), "rest": -1}, {**timings.to_json(), "levels": [2, 1]}):

        def change(data: Any, wrong: Any = wrong) -> Any:
            return {**data, "profile": {**data["profile"], "timings": wrong}}

        rewrite(tmp_path / "a", change)
        with pytest.raises(CheckpointError, match="the timings of the profile are malformed"):
            fv.load_profile(tmp_path / "a")
    assert Timings.from_json(json.loads(json.dumps(timings.to_json()))) == timings
