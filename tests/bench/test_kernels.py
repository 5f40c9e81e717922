import pytest
import torch

from foveate.bench import bandwidth, kernels
from foveate.kernels.dispatch import ensure_loaded
from foveate.kernels.threads import threads

needs_compiler = pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels here")


@needs_compiler
@pytest.mark.parametrize("variant", bandwidth.VARIANTS)
def test_read_touches_every_word(variant):
    block = torch.randint(-(1 << 62), 1 << 62, (8 * 16 * 4,))
    assert block.data_ptr() % 64 == 0
    assert bandwidth.read(block, *variant) == int(block.sum()) % (1 << 64)


@needs_compiler
def test_figures_of_small_weights():
    measured = kernels.measure(kernels.Sizes(width=256, threads=1, set_bytes=1 << 18, rounds=1))
    wanted = {f"bandwidth_ratio_b{b}" for b in (2, 3, 4, 6, 8)}
    wanted |= {"m4_b4", "time_ratio_b2_over_b8", "mixed_tiles_overhead", "zero_tiles_ratio"}
    assert wanted <= set(measured.figures)
    assert all(value > 0 for value in measured.figures.values())
    assert len(measured.rounds) == 1


def test_copies_count_their_bytes():
    weight = kernels.random_weight(256, 128)
    half = kernels.Copies.of(weight.kept(torch.full_like(weight.resident, 4)), 1 << 16)
    assert half.bytes_each == 256 * 256 // 2 + 256 * 2 * 4
    assert sum(b.numel() for b in half.blocks()) == half.bytes_each * len(half.weights)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(1):
        raise RuntimeError
    assert torch.get_num_threads() == before
