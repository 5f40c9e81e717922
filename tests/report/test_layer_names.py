from __future__ import annotations

import pytest

from foveate.precision.maps import PrecisionMap, Site
from foveate.report.layers import (
    blocks_of,
    dense_bytes,
    layers_of,
    mean_level,
    percent,
    shares,
    split_name,
    stored_bytes,
)


def weight(name: str, rows: int = 32, columns: int = 64) -> Site:
    return Site(f"{name}:weight", "weight", rows, columns, 32)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers.3", "mlp.up_proj")),
        ("layer1.0.conv1", ("layer1.0", "conv1")),
        ("model.layers.3.experts.7.up", ("model.layers.3", "experts.7.up")),
        ("lm_head", ("lm_head", "")),
        ("layers.3", ("layers.3", "")),
        ("", ("", "")),
    ],
)
def test_names_are_cut_after_their_first_number(path: str, split: tuple[str, str]) -> None:
    assert split_name(path) == split


def test_layers_with_the_same_parts_are_a_block() -> None:
    names = ["embed", *(f"layers.{i}.{part}" for i in range(3) for part in ("q", "k")), "layers.3.q", "head"]
    sites = [*(weight(n) for n in names), Site("layers.0.q:input", "input", 0, 64)]
    blocks = blocks_of(layers_of(sites))
    assert [(b.parts, [layer.name for layer in b.layers]) for b in blocks] == [
        (("",), ["embed"]),
        (("q", "k"), ["layers.0", "layers.1", "layers.2"]),
        (("q",), ["layers.3"]),
        (("",), ["head"]),
    ]


def test_sums_of_sites() -> None:
    sites = (weight("a"), weight("b"))
    plan = PrecisionMap(sites, {"a:weight": bytes([8, 4, 4, 0]), "b:weight": 4}, other_bytes=10)
    assert {level: share for level, share in shares(plan, sites).items() if share} == {0: 1 / 8, 4: 6 / 8, 8: 1 / 8}
    assert mean_level(plan, sites) == 4
    assert stored_bytes(plan, sites) == plan.bytes_stored - 10
    assert dense_bytes(plan, 4) == 4 * 2 * 32 * 64 + 10
    assert [percent(share) for share in (0, 0.001, 0.37, 1)] == ["0%", "<1%", "37%", "100%"]
