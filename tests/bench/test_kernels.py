from dataclasses import replace

import pytest
import torch

from foveate.bench import kernels
from foveate.bench.limits import bandwidth
from foveate.bench.shared import dense
from foveate.bench.shared.result import BackgroundLoad
from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.threads import threads
from kernels.cases import isas

needs_compiler = pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels here")


@needs_compiler
@pytest.mark.parametrize("loop", bandwidth.LOOPS)
def test_read_touches_every_word(loop):
    blocks = [torch.randint(-(1 << 62), 1 << 62, (8 * 16 * lines,)) for lines in (1, 20, 7000)]
    assert all(block.data_ptr() % 64 == 0 for block in blocks)
    for count in (1, 3):
        with threads(count):
            expected = sum(int(block.sum()) for block in blocks) % (1 << 64)
            assert bandwidth.Blocks(blocks).sum(loop) == expected


@needs_compiler
def test_figures_of_small_weights():
    grid = dense.Grid(shapes=((48, 64), (64, 48)), rows_of_x=(1, 3), int8_at=((48, 64), 3), cold_bytes=1, rounds=2)
    sizes = kernels.Sizes(width=256, threads=1, set_bytes=1 << 18, rounds=1, grid=replace(grid, least_seconds=0.0))
    measured = kernels.measure(sizes)
    wanted = {f"bandwidth_ratio_b{b}" for b in (2, 3, 4, 6, 8)} | {f"m4_b{b}" for b in (2, 3, 4, 6, 8)}
    wanted |= {"m2_b4", "m8_b4", "time_ratio_b2_over_b8", "mixed_tiles_overhead", "zero_tiles_ratio", "zero_tags_ratio"}
    wanted |= {"worst_vs_dense", "m3_vs_int8"}
    assert wanted <= set(measured.figures)
    assert ("bandwidth_ratio_b4_avx2" in measured.figures) == ("avx2" in isas())
    assert all(value > 0 for value in measured.figures.values())
    assert len(measured.rounds) == 1 + 4


@needs_compiler
def test_the_instruction_set_is_put_back():
    before = torch.ops.foveate._cpu_isa("")
    other = next((isa for isa in isas() if isa != before), before)
    with kernels.instructions(other):
        assert torch.ops.foveate._cpu_isa("") == other
    assert torch.ops.foveate._cpu_isa("") == before


def test_the_worst_ratio_over_dense_is_of_the_faster_dense_layer():
    times = {
        "float32": [4.0, 9.0, 4.0],
        "bfloat16": [2.0, 3.0, 8.0],
        **{f"b{b}": [1.0, 1.0, 1.0] for b in (2, 3, 4, 6)},
    }
    entry = dense.entry((16, 32), 4, {**times, "b8": [2.0, 6.0, 2.0]})
    assert entry["over_dense"] == {"b2": 1 / 3, "b3": 1 / 3, "b4": 1 / 3, "b6": 1 / 3, "b8": 1.0}
    assert dense.table([entry]).splitlines()[-1] == "  8 bits 1.000"


def test_copies_count_their_bytes():
    weight = dense.random_planes((256, 256), 128)
    half = kernels.Copies.of(weight.kept(torch.full_like(weight.stored_levels, 4)), 1 << 16)
    assert half.bytes_each == 256 * 256 // 2 + 256 * 2 * 2
    assert sum(b.numel() for b in half.blocks()) == half.bytes_each * len(half.weights)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(1):
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_time_that_went_to_neighbours(monkeypatch):
    seen = iter([(1.0, 10.0, 2.0, 100.0), (2.0, 21.0, 3.0, 120.0)])
    monkeypatch.setattr(BackgroundLoad, "_times", staticmethod(lambda: next(seen)))
    with BackgroundLoad() as background:
        pass
    assert (background.others, background.stolen) == (0.5, 0.05)
    assert background.note().startswith("other processes had 50.0% ")


def test_time_of_this_process_is_not_its_neighbours():
    own, used, stolen, every = BackgroundLoad._times()
    assert 0 < own <= used + 1  # clocks of two sources
    assert 0 <= stolen < every
