"""Decisions between two maps: the estimate of every instruction set, and what rows read in all forms of the product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.backends.table import ensure_loaded
from foveate.kernels.planes import choice as reference
from foveate.planes import PlaneTensor
from kernels.cases import Call, calls, forced, isas, simple
from tiny import coded, generator, random_levels

ensure_loaded()
ISAS = isas()
ops = torch.ops.foveate


def _sample(w: PlaneTensor, seed: int) -> tuple[Tensor, Tensor]:
    """Some strips of a weight, in ascending order, and weights of their rows."""
    g = generator(seed)
    count = int(torch.randint(0, min(4, w.grid[0]) + 1, (1,), generator=g))
    strips = torch.randperm(w.grid[0], generator=g)[:count].sort().values
    return strips, torch.rand(count, 16, generator=g)


@pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")
@settings(max_examples=80)
@given(calls(), st.integers(0, 1000))
def test_every_instruction_set_estimates_the_bits_of_the_reference(call: Call, seed: int) -> None:
    w = call.weights[0]
    maps = [int(m) for m in torch.randint(0, len(w.active_levels), (2,), generator=generator(seed))]
    args = (call.x, w.tensors, w.geometry, call.input_level, call.input_range, maps, *_sample(w, seed))
    expected = reference.plane_error(*args)
    for isa in ISAS:
        with forced(isa):
            got = ops.plane_error(*args)
            assert got.shape == (call.x.shape[:-1].numel(),)
            assert bool(((got == expected) | (got.isnan() & expected.isnan())).all()), isa


def test_an_estimate_is_the_weighted_squared_difference_of_products() -> None:
    call = simple(72, 100, 6)
    (w,) = call.weights
    strips, weights = torch.tensor([1, 4]), torch.rand(2, 16, generator=generator(1))
    got = ops.plane_error(call.x, w.tensors, w.geometry, call.input_level, None, [1, 0], strips, weights)
    low, high = (
        replace(call, map_of_row=torch.full((6,), m), biases=[torch.empty(0)]).run()[0].double() for m in (1, 0)
    )
    rows = torch.tensor([*range(16, 32), *range(64, 72)])
    expected = ((high - low)[:, rows].square() * weights.flatten()[:24].double()).sum(1)
    # 24 squares of differences of float32 products
    size = float((high.abs().amax() + low.abs().amax()) ** 2)
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-6 * size)
    exact = ops.plane_error(call.x, w.tensors, w.geometry, call.input_level, None, [1, 1], strips, weights)
    assert bool((exact == 0).all())


@dataclass
class _Model:
    """Two weights that share an input, in a generation whose rows choose between maps 1 and 0."""

    weights: list[PlaneTensor]
    book: Tensor
    handle: Tensor
    counts: Tensor
    samples: list[tuple[Tensor, Tensor]]
    thresholds: Tensor


def _model(thresholds: Tensor | None = None, inputs: tuple[int, int] = (8, 8)) -> _Model:
    weights = [coded(72, 96, seed=3).planes, coded(40, 96, seed=4, reach=1, row_gains=True).planes]
    tiles = [w.stored_levels.numel() for w in weights]
    book = ops.generation_book(torch.empty(0), tiles, 1)
    levels = torch.stack(
        [torch.cat([torch.full((n,), 8, dtype=torch.uint8) for n in tiles])]
        + [torch.cat([random_levels(w, seed, (2, 3, 4)).flatten() for w in weights]) for seed in (5, 6)]
    )
    samples = [(torch.tensor([0, 3]), torch.rand(2, 16)), (torch.tensor([1]), torch.rand(1, 16))]
    counts = torch.zeros(1, 2, 2, dtype=torch.int64)
    thresholds = torch.zeros(2) if thresholds is None else thresholds
    choices = [
        torch.tensor([[1, 0]], dtype=torch.uint8),
        thresholds.view(1, 2),
        torch.tensor([[0, 2, 3]]),
        torch.cat([strips for strips, _ in samples]),
        torch.cat([part for _, part in samples]),
        counts,
    ]
    input_levels = torch.tensor([[inputs[1]], [inputs[0]], [8]], dtype=torch.uint8)
    pairs = torch.tensor([[1, 0], [2, 2], [0, 0]], dtype=torch.uint8)
    ops.publish(book, levels, input_levels, torch.zeros(2), pairs, choices)
    tensors, geometries = [t for w in weights for t in w.tensors], [n for w in weights for n in w.geometry]
    level, limits = torch.full((1,), 8, dtype=torch.uint8), torch.zeros(2)
    handle = ops.plane_handle(tensors, geometries, [level] * 2, [limits] * 2, [0, 1], [0, 0])
    return _Model(weights, book, handle, counts, samples, thresholds)


def _tensors(model: _Model, place: int) -> tuple[Tensor, ...]:
    w = model.weights[place]
    return (*w.tensors[:-1], ops.pass_levels(model.book, place, *w.grid))


def _errors(model: _Model, place: int, x: Tensor) -> Tensor:
    level, limits = ops.pass_input(model.book, 0)
    w = model.weights[place]
    return reference.plane_error(x, _tensors(model, place), w.geometry, level, limits, [1, 0], *model.samples[place])


def _some(x: Tensor, inputs: tuple[int, int] = (8, 8)) -> _Model:
    """A model in which about half of the rows read the higher map."""
    first = _model(inputs=inputs)
    return _model(torch.stack([_errors(first, place, x).median() for place in (0, 1)]), inputs)


@pytest.mark.parametrize("inputs", [(8, 8), (4, 16), (8, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_read_the_higher_map_where_the_estimate_is_above_the_threshold(
    inputs: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(9, 96) * torch.rand(9, 1) * 3).to(dtype)
    torch.manual_seed(1)
    model = _some(x, inputs)
    got = ops.plane_linear_by_handle(x, model.handle, model.book, None, [], [72, 40])
    for place, (w, y) in enumerate(zip(model.weights, got, strict=True)):
        errors = _errors(model, place, x)
        high = ~(errors <= model.thresholds[place])
        assert 0 < int(high.sum()) < 9
        assert model.counts[0, place].tolist() == [9, int(high.sum())]
        maps = (~high).to(torch.uint8)[:, None].repeat(1, 2)
        pairs = torch.tensor([[1, 0]] * 9, dtype=torch.uint8)
        tensors = _tensors(model, place)
        assert torch.equal(ops.pass_choice(model.book, [place, 0], x, tensors, w.geometry, pairs), maps)
        assert torch.equal(reference.pass_choice(model.book, [place, 0], x, tensors, w.geometry, maps), maps)
        level, limits = ops.pass_input(model.book, 0)
        (expected,) = ops.plane_linear(x, tensors, [torch.empty(0)], w.geometry, level, maps, None, limits)
        if 32 in inputs:
            assert torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(y, expected)


def test_a_row_decides_alone() -> None:
    x = torch.randn(70, 96, generator=generator(0)) * torch.rand(70, 1, generator=generator(1)) * 3
    model = _some(x)
    (w, _), tensors = model.weights, _tensors(model, 0)
    pairs = torch.tensor([[1, 0]], dtype=torch.uint8)
    together = ops.pass_choice(model.book, [0, 0], x, tensors, w.geometry, pairs.repeat(70, 1))
    alone = [ops.pass_choice(model.book, [0, 0], row, tensors, w.geometry, pairs) for row in x.split(1)]
    assert torch.equal(together, torch.cat(alone))
    assert together.unique().tolist() == [0, 1]


def test_rows_of_classes_without_a_choice_read_their_map() -> None:
    x = torch.randn(4, 96, generator=generator(0)) * 3
    model = _model(torch.full((2,), 1e30))  # no estimate is above: the lower map
    ops.rows_of_passes(model.book, torch.tensor([0, 1, 2, 0], dtype=torch.uint8))
    ops.begin_pass(model.book, 0)
    got = ops.plane_linear_by_handle(x, model.handle, model.book, None, [], [72, 40])[0]
    level, limits = ops.pass_input(model.book, 0)
    maps = torch.tensor([1, 2, 0, 1], dtype=torch.uint8)[:, None].repeat(1, 2)
    w = model.weights[0]
    (expected,) = ops.plane_linear(x, _tensors(model, 0), [torch.empty(0)], w.geometry, level, maps, None, limits)
    assert torch.equal(got, expected)
    assert model.counts[0].tolist() == [[2, 0], [2, 0]]
    ops.end_pass(model.book)


def test_an_estimate_that_is_no_number_takes_the_higher_map_and_lookups_do() -> None:
    model = _model(torch.full((2,), 1e30))
    x = torch.full((1, 96), float("nan"))
    pairs = torch.tensor([[1, 0]], dtype=torch.uint8)
    w, tensors = model.weights[0], _tensors(model, 0)
    assert ops.pass_choice(model.book, [0, 0], x, tensors, w.geometry, pairs).tolist() == [[0, 0]]
    index = torch.tensor([5])
    higher = ops.plane_embedding(index, tensors, w.geometry, torch.zeros(1, 2, dtype=torch.uint8))
    assert torch.equal(ops.plane_embedding(index, tensors, w.geometry, pairs), higher)


def test_what_is_refused() -> None:
    model = _model()
    w, tensors = model.weights[0], _tensors(model, 0)
    x = torch.randn(1, 96)
    unknown = torch.tensor([[2, 0]], dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="reads one of maps 2 and 0, and no choice says which"):
        ops.pass_choice(model.book, [0, 0], x, tensors, w.geometry, unknown)
    levels, inputs = torch.zeros(3, 24, dtype=torch.uint8), torch.full((3, 1), 8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="reads one of maps 1 and 0, and no choice says which"):
        ops.publish(model.book, levels, inputs, torch.zeros(2), torch.tensor([[1, 0]], dtype=torch.uint8), [])
    if ISAS:
        level = torch.full((3,), 8, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match=r"strip \(=7\) is not one of 5"):
            ops.plane_error(x, tensors, w.geometry, level, None, [1, 0], torch.tensor([7]), torch.ones(1, 16))
