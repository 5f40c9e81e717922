from __future__ import annotations

import math

import pytest

from foveate.bench import saved
from foveate.kernels.backends.table import ensure_loaded

needs_compiler = pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels here")


@needs_compiler
def test_every_op_is_compared_with_reading_and_copying() -> None:
    sizes = saved.Sizes(tensors=(1, 2), threads=(1,), set_bytes=4 << 20, rounds=2)
    measured = saved.measure(sizes)
    assert all(math.isfinite(v) and v > 0 for v in measured.figures.values())
    assert len(measured.rounds) == 2 * len(sizes.tensors)
    for name in ("read_share_pack_b2_1mb_t1", "over_copy_unpack_b8_2mb_t1", "over_bfloat16_mask_pack_2mb_t1"):
        assert name in measured.figures
    assert not any(key.startswith("read_share_unpack") for key in measured.figures)
    first = [r for r in measured.rounds if r["tensors"] == "2mb_t1"]
    expected = sorted(r["pack_b4"] / r["copy"] for r in first)
    assert measured.figures["over_copy_pack_b4_2mb_t1"] == pytest.approx(sum(expected) / 2)
