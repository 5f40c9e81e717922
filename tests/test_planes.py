from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.memory.arena import ALIGNMENT, HUGE_PAGE, arena
from foveate.planes import PlaneTensor, gathered, level_bytes, share_active_levels
from foveate.precision.maps import PrecisionMap, Site
from tiny import coded, random_levels


def _site(w: PlaneTensor) -> Site:
    return Site("a:weight", "weight", w.rows, w.columns, w.group, w.gain.shape[1] > 1)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    group=st.sampled_from((32, 64, 128)),
    row_gains=st.booleans(),
    seed=st.integers(0, 999),
)
def test_kept_is_the_same_weight_with_fewer_bytes(
    rows: int, columns: int, group: int, row_gains: bool, seed: int
) -> None:
    w = coded(rows, columns, group=group, row_gains=row_gains, seed=seed)
    levels = random_levels(w.planes, seed)
    kept = w.planes.kept(levels)
    assert torch.equal(kept.active_levels, levels[None])
    expected = coded(rows, columns, group=group, row_gains=row_gains, seed=seed).planes
    expected.active_levels.copy_(levels[None])
    assert torch.equal(kept.dequantize(), expected.dequantize())
    # the map of these levels counts every byte of it
    plan = PrecisionMap((_site(kept),), {"a:weight": bytes(levels.flatten().tolist())})
    assert kept.nbytes() + kept.stored_levels.numel() == plan.bytes_resident  # a generation has the levels once more
    stored = sum(t.numel() * t.element_size() for t in (*kept.planes, kept.scales, kept.gain, kept.stored_levels))
    assert stored == plan.bytes_stored
    # and what was there is as it was
    assert int(w.planes.active_levels.min()) == 8
    # lower, again
    lower = torch.minimum(levels, random_levels(w.planes, seed + 1))
    assert torch.equal(kept.kept(lower).dequantize(), w.planes.kept(lower).dequantize())


def test_kept_lowers_active_levels_but_does_not_raise_them() -> None:
    w = coded(20, 70).planes
    w = replace(w, active_levels=torch.stack([torch.full(w.grid, 2, dtype=torch.uint8), w.stored_levels]))
    kept = w.kept(torch.full(w.grid, 4, dtype=torch.uint8))
    assert kept.active_levels[0].unique().tolist() == [2]
    assert kept.active_levels[1].unique().tolist() == [4]


def test_kept_cannot_bring_planes_back() -> None:
    w = coded(20, 70).planes.kept(torch.full((2, 3), 4, dtype=torch.uint8))
    with pytest.raises(FoveateError, match="cannot be kept at a level above"):
        w.kept(torch.full((2, 3), 6, dtype=torch.uint8))


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        coded(4, 4).planes.rows = 5  # type: ignore[misc]


def test_gathered_is_the_same_weights_side_by_side() -> None:
    weights = [coded(n, 70, seed=n).planes for n in (5, 40, 17)]
    weights[1] = weights[1].kept(random_levels(weights[1], 3))
    together = gathered(weights)
    for old, new in zip(weights, together, strict=True):
        assert torch.equal(old.dequantize(), new.dequantize())
        assert new.nbytes() == old.nbytes()
        assert all(p.data_ptr() % ALIGNMENT == 0 for p in (*new.planes, new.scales) if p.numel())
    storages = {w.planes[0].untyped_storage().data_ptr() for w in together}
    assert len(storages) == 1
    # active levels are one block, in order
    ends = [w.active_levels.data_ptr() + w.active_levels.numel() for w in together]
    assert [w.active_levels.data_ptr() for w in together[1:]] == ends[:-1]


def test_shared_levels_of_nothing() -> None:
    assert share_active_levels([]) == []
    assert gathered([]) == []


@pytest.mark.parametrize("total", [0, 100, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_arena(total: int) -> None:
    sizes = [total // 3, 0, total - total // 3 * 2, total // 3]
    parts = arena(sizes)
    assert [len(p) for p in parts] == sizes
    for i, part in enumerate(parts):
        part.fill_(i + 1)
    assert all(bool((p == i + 1).all()) for i, p in enumerate(parts))
    assert all(p.data_ptr() % ALIGNMENT == 0 for p in parts if len(p) and total >= HUGE_PAGE)
    if total > HUGE_PAGE:
        assert parts[0].data_ptr() % HUGE_PAGE == 0


@pytest.mark.parametrize(
    ("level", "group", "expected"),
    [(0, 128, 0), (2, 128, 512 + 32), (3, 128, 768 + 32), (4, 64, 512 + 32), (6, 32, 384 + 32), (8, 128, 2048 + 32)],
)
def test_bytes_of_a_tile_by_hand(level: int, group: int, expected: int) -> None:
    # 16 rows x group x level / 8, and 32 bytes of scales
    assert level_bytes(level, 1, group) == expected
    assert level_bytes(level, 7, group) == 7 * expected


def test_gains_are_padded_to_whole_tiles() -> None:
    w = coded(20, 70, row_gains=True)
    assert w.planes.gain.shape == (2, 32)
    assert torch.equal(w.planes.gain[:, :20], w.gain)
    assert coded(20, 70).planes.gain.shape == (2, 1)


def test_copies_are_independent() -> None:
    w = coded(20, 70).planes
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert torch.equal(other.dequantize(), w.dequantize())
        other.active_levels.fill_(0)
        assert float(w.dequantize().abs().max()) > 0
