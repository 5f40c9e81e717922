"""The ops that change the form of what moves, against their reference, on all instruction sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.formats.levels import PLANE_BITS
from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.convert import reference
from kernels.cases import forced, isas
from tiny import generator

ensure_loaded()
ops = torch.ops.foveate
SHAPES = st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([32, 64, 128]), st.integers(0, 1 << 30))


def _bytes(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


def _tiles(module: Any, rows: Tensor, plane: int, group: int) -> Tensor:
    out = torch.full((rows.numel(),), 7, dtype=torch.uint8)
    module.plane_to_tiles(rows, plane, group, out)
    return out


def _planes(module: Any, w: Tensor, offset: Tensor, inverse: Tensor, group: int) -> list[Tensor]:
    out = [torch.full((w.numel() * bits // 8,), 7, dtype=torch.uint8) for bits in PLANE_BITS]
    module.halves_to_planes(w, offset, inverse, group, out)
    return out


def _upper(module: Any, codes: Tensor, level: int) -> Tensor:
    out = torch.full((codes.numel() // 2,), 7, dtype=torch.uint8)
    module.upper_halves(codes, level, out)
    return out


@given(SHAPES, st.integers(0, 4))
def test_plane_to_tiles(shape: tuple[int, int, int, int], plane: int) -> None:
    strips, groups, group, seed = shape
    bits = PLANE_BITS[plane]
    rows = _bytes(16 * strips, groups * group * bits // 8, seed=seed)
    expected = _tiles(reference, rows, plane, group)
    for isa in isas():
        with forced(isa):
            assert torch.equal(_tiles(ops, rows, plane, group), expected), isa


@given(SHAPES, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([1.0, 1e-6, 1e4]))
def test_weights_of_16_bits(shape: tuple[int, int, int, int], dtype: torch.dtype, size: float) -> None:
    strips, groups, group, seed = shape
    some = generator(seed)
    w = (torch.randn(16 * strips, groups * group, generator=some) * size).to(dtype)
    offset, inverse = torch.randn(16 * strips, groups, generator=some), torch.rand(16 * strips, groups, generator=some)
    offset, inverse = offset * size, inverse * 100 / size
    extremes, planes = reference.half_extremes(w, group), _planes(reference, w, offset, inverse, group)
    for isa in isas():
        with forced(isa):
            assert torch.equal(ops.half_extremes(w, group), extremes), isa
            found = _planes(ops, w, offset, inverse, group)
            assert all(torch.equal(a, b) for a, b in zip(found, planes, strict=True)), isa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_no_extremes(bad: float, dtype: torch.dtype) -> None:
    w = torch.randn(16, 96, generator=generator(0)).to(dtype)
    w[3, 40] = bad
    for isa in isas():
        with forced(isa):
            least, greatest = ops.half_extremes(w, 32)
            assert torch.equal(least.isnan(), torch.arange(16)[:, None].expand(16, 3) == 3)
            assert torch.equal(greatest.isnan(), least.isnan())


@given(st.integers(0, 300), st.sampled_from([16, 8, 4]), st.integers(0, 1 << 30))
def test_upper_halves(count: int, level: int, seed: int) -> None:
    codes = _bytes(2 * count, seed=seed)
    expected = _upper(reference, codes, level)
    for isa in isas():
        with forced(isa):
            assert torch.equal(_upper(ops, codes, level), expected), isa


def test_rows_that_begin_at_any_byte() -> None:
    whole = _bytes(1 + 32 * 16, seed=4)
    rows = whole[1:].view(32, 16)
    assert torch.equal(_tiles(ops, rows, 0, 32), _tiles(ops, rows.clone(), 0, 32))
    assert torch.equal(_tiles(reference, rows, 0, 32), _tiles(ops, rows.clone(), 0, 32))
    with pytest.raises(RuntimeError, match="multiple of 4 bytes"):
        ops.plane_to_tiles(rows.clone(), 0, 32, torch.empty(1 + 512, dtype=torch.uint8)[1:])


def test_many_threads_give_the_same() -> None:
    rows, w = _bytes(512, 1024, seed=1), torch.randn(512, 1024, generator=generator(2)).half()
    parts = torch.randn(512, 8, generator=generator(3))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(
            [
                _tiles(ops, rows, 0, 128),
                ops.half_extremes(w, 128),
                *_planes(ops, w, parts, parts.abs() * 20, 128),
                _upper(ops, rows.flatten(), 8),
            ]
        )
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_not_of_the_form_is_refused() -> None:
    w, part = torch.zeros(16, 32).half(), torch.zeros(16, 1)
    planes = [torch.zeros(16 * 32 * bits // 8, dtype=torch.uint8) for bits in PLANE_BITS]
    for call in (
        lambda: _tiles(ops, torch.zeros(16, 8), 0, 32),
        lambda: _tiles(ops, _bytes(15, 8, seed=0), 0, 32),
        lambda: _tiles(ops, _bytes(16, 8, seed=0), 5, 32),
        lambda: _tiles(ops, _bytes(16, 8, seed=0), -1, 32),
        lambda: _tiles(ops, _bytes(16, 16, seed=0)[:, ::2], 0, 32),
        lambda: ops.plane_to_tiles(_bytes(16, 8, seed=0), 0, 32, _bytes(127, seed=0)),
        lambda: ops.half_extremes(w.float(), 32),
        lambda: ops.half_extremes(w, 0),
        lambda: ops.half_extremes(w, 64),
        lambda: ops.halves_to_planes(w, part[:8], part, 32, planes),
        lambda: ops.halves_to_planes(w, part, part.double(), 32, planes),
        lambda: ops.halves_to_planes(w.T, part, part, 32, planes),
        lambda: ops.halves_to_planes(w, part, part, 32, planes[:4]),
        lambda: ops.halves_to_planes(w, part, part, 32, planes[::-1]),
        lambda: ops.halves_to_planes(w, part, part, 32, [planes[0][::2], *planes[1:]]),
        lambda: _upper(ops, _bytes(3, seed=0), 8),
        lambda: _upper(ops, _bytes(4, seed=0), 2),
        lambda: _upper(ops, _bytes(4, seed=0).view(2, 2), 8),
        lambda: ops.upper_halves(_bytes(4, seed=0), 8, torch.zeros(2)),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_the_ops_are_registered_as_torch_wants_it() -> None:
    w, part = torch.randn(32, 64).half(), torch.rand(32, 2)
    torch.library.opcheck(ops.plane_to_tiles.default, (_bytes(32, 16, seed=0), 0, 32, _bytes(512, seed=0)))
    torch.library.opcheck(ops.half_extremes.default, (w, 32))
    planes = [_bytes(2048 * bits // 8, seed=0) for bits in PLANE_BITS]
    torch.library.opcheck(ops.halves_to_planes.default, (w, part, part, 32, planes))
    torch.library.opcheck(ops.upper_halves.default, (_bytes(10, seed=0), 4, _bytes(5, seed=0)))
