from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate as fv
from foveate.errors import BudgetError, LevelError, SiteError
from foveate.precision.maps import PrecisionMap, Site, input_level_for, uniform
from foveate.precision.profiles import Profile
from foveate.sizes import format_bytes, parse_bytes

LEVELS = (0, 2, 3, 4, 6, 8)
SITES = (
    Site("a.q:weight", "weight", 40, 100, 64, True, 40),
    Site("a.k:weight", "weight", 33, 64, 32, False, 33, ("b.k:weight",)),
    Site("embed:weight", "weight", 100, 70, 128, False, 1),
    Site("a.q:input", "input", 0, 100),
    Site("a.k:input", "input", 0, 64),
)


def _plan(levels: dict[str, int | bytes] | None = None, **keywords: object) -> PrecisionMap:
    plan = uniform(SITES, 4, 1000)
    return replace(plan, levels={**plan.levels, **(levels or {})}, **keywords)  # type: ignore[arg-type]


@st.composite
def maps(draw: st.DrawFn) -> PrecisionMap:
    levels: dict[str, int | bytes] = {}
    for site in SITES:
        if site.kind == "input":
            levels[site.name] = draw(st.sampled_from((4, 8, 16, 32)))
        elif draw(st.booleans()):
            levels[site.name] = draw(st.sampled_from(LEVELS))
        else:
            levels[site.name] = bytes(draw(st.lists(st.sampled_from(LEVELS), min_size=site.tiles, max_size=site.tiles)))
    loss = draw(st.one_of(st.just(math.nan), st.floats(0, 1e6)))
    return PrecisionMap(SITES, levels, draw(st.integers(0, 10**9)), loss)


@given(maps())
def test_a_map_survives_json_and_pickle(plan: PrecisionMap) -> None:
    text = json.dumps(plan.to_json(), allow_nan=False)
    back = PrecisionMap.from_json(json.loads(text), SITES, plan.other_bytes)
    for other in (back, pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert other == plan
        assert dict(other.levels) == dict(plan.levels)
        assert other.bytes_stored == plan.bytes_stored
        assert repr(other.predicted_loss) == repr(plan.predicted_loss)


@given(maps())
def test_bytes_add_up_tile_by_tile(plan: PrecisionMap) -> None:
    planes = 0
    read = 0.0
    overhead_stored = overhead_resident = 0
    for site in SITES[:3]:
        strips, groups = -(-site.rows // 16), -(-site.columns // site.group)
        levels = plan.levels[site.name]
        tiles = [levels] * (strips * groups) if isinstance(levels, int) else list(levels)
        size = sum(2 * site.group * level + 32 * (level > 0) for level in tiles)
        planes += size
        read += size * site.rows_read / site.rows
        # float16 for levels 2 and 3; rows padded to whole tiles
        gains = 4 * (16 * strips if site.row_gains else 1)
        overhead_stored += strips * groups + gains
        # gains; a tile has a stored level and two active ones; a strip has six int64 offsets
        overhead_resident += 3 * strips * groups + gains + 48 * strips
    assert plan.bytes_stored == plan.other_bytes + planes + overhead_stored
    assert plan.bytes_resident == plan.other_bytes + planes + overhead_resident
    assert plan.bytes_read == plan.other_bytes + round(read)
    assert plan.bits == 8 * (planes + overhead_stored) / (40 * 100 + 33 * 64 + 100 * 70)


@given(maps())
def test_counts_and_mean_level(plan: PrecisionMap) -> None:
    for site in plan.weight_sites():
        counts = plan.counts(site)
        assert sum(counts.values()) == site.tiles
        mean = sum(level * n for level, n in counts.items()) / site.tiles
        assert plan.mean_level(site) == pytest.approx(mean)


def test_a_uniform_byte_string_is_a_level() -> None:
    assert _plan({"a.q:weight": bytes([3]) * SITES[0].tiles}) == _plan({"a.q:weight": 3})


def test_it_is_frozen() -> None:
    plan = _plan()
    with pytest.raises(FrozenInstanceError):
        plan.other_bytes = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.levels["a.q:weight"] = 2  # type: ignore[index]


def test_equal_maps_are_equal_whatever_is_predicted_of_them() -> None:
    assert _plan(predicted_loss=math.nan) == _plan(predicted_loss=float("nan")) == _plan(predicted_loss=0.5)
    assert hash(_plan()) == hash(_plan(predicted_loss=0.5))
    assert _plan() != _plan({"a.q:weight": 3})


def test_with_level() -> None:
    plan = _plan()
    changed = plan.with_level("a.*:weight", 3)
    assert [changed.levels[s.name] for s in SITES] == [3, 3, 4, 8, 8]
    assert math.isnan(changed.predicted_loss)
    assert plan.levels["a.q:weight"] == 4
    # a pattern that names weights means them, whatever else it names
    for level in (6, 8):
        assert [plan.with_level("*", level).levels[s.name] for s in SITES] == [level, level, level, 8, 8]
    assert [plan.with_level("a.*", 6).levels[s.name] for s in SITES] == [6, 6, 4, 8, 8]
    # by the name of an alias, and inputs by their own levels
    assert plan.with_level("b.k:weight", 2).levels["a.k:weight"] == 2
    assert plan.with_level("*:input", 32).levels["a.k:input"] == 32
    assert plan.with_level("*:weight", 0).bytes_stored == 1000 + sum(s.stored_overhead() for s in SITES[:3])


def test_errors_name_the_value_and_the_rule() -> None:
    plan = _plan()
    with pytest.raises(SiteError, match=r"pattern '\*\.nothing' matches none of 5 sites, which are like a.q:weight"):
        plan.with_level("*.nothing", 4)
    with pytest.raises(LevelError, match=r"level \(=5\) is not one of 0, 2, 3, 4, 6, 8"):
        plan.with_level("a.q:weight", 5)
    with pytest.raises(LevelError, match=r"input level \(=3\) is not one of"):
        plan.with_level("*:input", 3)
    exact = plan.with_level("*", 16)  # inputs have it, but weights are meant
    assert {s.kind for s in exact.sites if exact.levels[s.name] == 16} == {"weight"}
    with pytest.raises(LevelError, match="3 tile levels for 6 tiles"):
        _plan({"a.q:weight": b"\2\2\2"})
    with pytest.raises(LevelError, match=r"level \(=7\) is not one of"):
        _plan({"a.q:weight": b"\2\2\2\7\2\2"})
    with pytest.raises(LevelError, match="an input has one level"):
        _plan({"a.q:input": b"\4"})
    with pytest.raises(SiteError, match="names sites that are not listed: x"):
        _plan({"x": 4})
    with pytest.raises(SiteError, match=r"the map has no level for site 'a\.q:weight'"):
        PrecisionMap(SITES, {})


MALFORMED = [
    {},
    [],
    None,
    {"levels": None},
    {"levels": []},
    {"levels": {}},
    {"levels": {"a.q:weight": 4.0}},
    {"levels": {"a.q:weight": "44"}},
    {"levels": {"a.q:weight": [4, 6]}},
    {"levels": {"a.q:weight": [[4]]}},
    {"levels": {"a.q:weight": [[4, 7]]}},
    {"levels": {"a.q:weight": [[4, -1], [4, 7]]}},
    {"levels": {"a.q:weight": [[4, 10**15]]}},
    {"levels": {"a.q:weight": [[300, 6]]}},
    {"levels": {"a.q:weight": [[5, 6]]}},
    {"levels": {"a.q:weight": [["4", 6]]}},
    {"levels": {"a.q:weight": [[4, 6.0]]}},
    {"levels": {"a.q:weight": True}},
    {"levels": {"a.q:weight": None}},
    {"levels": {"unknown": 4}},
    {"predicted_loss": "little"},
    {"predicted_loss": [1]},
    {"predicted_loss": 10**400},
]


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_json_is_a_clear_error(data: object) -> None:
    if isinstance(data, dict):
        good = _plan().to_json()
        levels = (
            {**good["levels"], **data["levels"]}
            if isinstance(data.get("levels"), dict) and data["levels"]
            else data.get("levels", good["levels"])
        )
        data = {**good, **data, "levels": levels} if data else data
    with pytest.raises((LevelError, SiteError)):
        PrecisionMap.from_json(data, SITES, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (5, 5),
        ("5", 5),
        ("800MiB", 800 << 20),
        ("6GB", 6 * 10**9),
        ("6G", 6 << 30),
        ("1.5 kib", 1536),
        (" .5 K ", 512),
        ("7b", 7),
    ],
)
def test_sizes(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "6 TiB", "six", "-5", "6e9", "1.2.3", "6 GiB!", "9" * 500, 6e9, None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(BudgetError, match="is not a number of bytes like"):
        parse_bytes(text)  # type: ignore[arg-type]


def test_formatted_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 1234567, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.18 MiB",
        "5120.00 GiB",
    ]


def test_budgets() -> None:
    assert fv.Budget(bytes="1KiB").bytes == 1024
    for wrong in ({}, {"bits": 4, "loss": 1}, {"bytes": 1, "bits": 2, "loss": 3}):
        with pytest.raises(BudgetError, match="exactly one of bytes, bits, loss"):
            fv.Budget(**wrong)  # type: ignore[arg-type]
    for wrong in ({"bits": 0}, {"bytes": -1}, {"bytes": "0"}, {"loss": -0.1}, {"bits": math.inf}, {"loss": math.nan}):
        with pytest.raises(BudgetError, match="must be a positive finite number"):
            fv.Budget(**wrong)  # type: ignore[arg-type]


def test_inputs_of_precise_weights_are_precise() -> None:
    assert [input_level_for(level) for level in (0, 2, 6, 6.1, 8)] == [8, 8, 8, 16, 16]
    assert uniform(SITES, 8).levels["a.q:input"] == 16
    assert uniform(SITES, 8, input_level=4).levels["a.q:input"] == 4


@given(maps())
def test_uniform_of_bytes_has_the_bytes(plan: PrecisionMap) -> None:
    even = fv.uniform_of_bytes(plan)
    # each weight is rounded to whole tiles, which cost at most 2 more bits, or 4 x 128 + 32 bytes
    step = 2 * 128 * 2 + 32
    difference = even.bytes_resident - plan.bytes_resident
    assert abs(difference) <= step * len(list(plan.weight_sites()))
    for site in SITES[3:]:
        assert even.levels[site.name] == plan.levels[site.name]
    present = sorted({level for s in plan.weight_sites() for level, n in even.counts(s).items() if n})
    assert len(present) <= 2
    if len(present) == 2:
        assert LEVELS.index(present[1]) == LEVELS.index(present[0]) + 1


@pytest.mark.parametrize("level", LEVELS)
def test_uniform_of_a_uniform_map_is_itself(level: int) -> None:
    plan = uniform(SITES, level, 77)
    assert fv.uniform_of_bytes(plan) == plan


def test_uniform_of_bytes_is_spread_evenly() -> None:
    site = Site("w:weight", "weight", 16 * 40, 128 * 10, 128)
    plan = PrecisionMap((site,), {"w:weight": bytes([8] * 100 + [2] * 300)})
    levels = fv.uniform_of_bytes(plan).levels["w:weight"]
    assert isinstance(levels, bytes)
    halves = [sum(levels[i : i + 40]) / 40 for i in range(0, 400, 40)]
    assert max(halves) - min(halves) <= 0.1


def test_profile_predicts_sums_of_tiles() -> None:
    losses = {s.name: torch.rand(s.tiles, 6) for s in SITES[:3]}
    profile = Profile(SITES, losses, 0, 1, "logits")
    levels = bytes([0, 2, 3, 4, 6, 8])
    plan = PrecisionMap(SITES, {**uniform(SITES, 3).levels, "a.q:weight": levels})
    expected = sum(float(losses["a.q:weight"][i, i]) for i in range(6))
    expected += sum(float(losses[s.name][:, 2].sum()) for s in SITES[1:3])
    assert profile.predict(plan) == pytest.approx(expected, rel=1e-6)
    assert profile.uniform(3).predicted_loss == pytest.approx(
        sum(float(t[:, 2].sum()) for t in losses.values()), rel=1e-6
    )


def test_what_stays_float_is_said() -> None:
    plan = replace(uniform(SITES, 4, 10**6), other_parameters=None)
    assert plan.stays_float == ""
    assert math.isnan(plan.bits_of_model)
    weights = sum(s.weights for s in plan.weight_sites())
    known = replace(plan, other_parameters={"LSTM": weights, "LayerNorm": 1})
    assert known.stays_float == "50 % of the parameters stay float: LSTM 50 %"
    assert known.bits_of_model == pytest.approx(8 * known.bytes_stored / (2 * weights + 1))
    assert f"{known.bits_of_model:.3f} bits a parameter of the model" in repr(known)
    assert repr(known).endswith("sites; 50 % of the parameters stay float: LSTM 50 %)")
    assert pickle.loads(pickle.dumps(known)).other_parameters == known.other_parameters
    assert replace(plan, other_parameters={"LayerNorm": 1}).stays_float == ""
    assert "stay float" not in repr(plan)
