import math

import pytest
import torch

from foveate.bench import decode
from foveate.bench.shared.random_model import on_random_planes, random_llama
from foveate.nn.levels import apply, current_map
from foveate.nn.registry import registry_of
from foveate.precision.maps import uniform

SHAPE = decode.Shape(width=64, intermediate=96, layers=1, heads=2, kv_heads=1, vocabulary=128)
TINY = decode.Sizes(
    shape=SHAPE, threads=1, prompt=4, tokens=3, prefill=16, batch=2, rounds=2, compiled=False, read_bytes=1 << 20
)
pytest.importorskip("transformers")


def test_figures_of_ours():
    measured = decode.measure(TINY)
    assert not any("ratio" in name for name in measured.figures)
    assert {"non_kernel_share", "peak_memory_over_computed", "model_bytes_b4"} <= set(measured.figures)
    assert {f"tokens_per_second_b{b}" for b in (2, 3, 4, 6, 8)} <= set(measured.figures)
    assert measured.figures["non_kernel_share"] < 1  # a busy machine may hold up the products that it is measured from
    assert all(math.isfinite(v) for v in measured.figures.values())
    assert len(measured.rounds) == 2


def test_bytes_of_a_token_are_what_the_map_reads():
    ours = decode.Ours(TINY)
    for level in (2, 8):
        apply(ours.model, ours.maps[level])
        assert current_map(ours.model).bytes_read == ours.maps[level].bytes_read
    assert ours.maps[2].bytes_read < ours.maps[8].bytes_read


def test_times_are_those_of_the_prompt_and_of_every_token():
    model = random_llama(**SHAPE.config(32))
    times = decode.generate(model, prompt=4, tokens=5)
    assert len(times) == 1 + 5
    assert times == sorted(times)


def test_a_random_model_computes_and_switches():
    torch.manual_seed(0)
    with torch.device("meta"):
        layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(2)))
    on_random_planes(layers)
    registry = registry_of(layers)
    x_MK = torch.randn(3, 64)
    outputs = []
    for level in (2, 8):
        apply(layers, uniform(registry.sites, level))
        outputs.append(layers(x_MK))
    assert all(bool(torch.isfinite(y).all()) for y in outputs)
    assert not torch.equal(*outputs)
    first, second = (w.value for w in registry.weights.values())
    assert torch.equal(first.planes[0], second.planes[0])
    assert first.planes[0].data_ptr() != second.planes[0].data_ptr()
