"""The ops that collect statistics: the reference's numbers, the same bits with all instruction sets and threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.kernels.collect import reference
from foveate.kernels.planes.inputs import quantize_input
from kernels.cases import forced, isas
from tiny import generator

ISAS = isas()
ops = torch.ops.foveate
#: The rounding of one float32 operation.
EPS = torch.finfo(torch.float32).eps
needs_kernels = pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")


def _rows(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed)) * 2.0 ** (seed % 7) + seed % 3


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 200), columns=st.integers(1, 90), seed=st.integers(0, 1000), strided=st.booleans())
def test_sums_over_rows(rows: int, columns: int, seed: int, strided: bool) -> None:
    x = _rows(rows, 2 * columns, seed)[:, ::2] if strided else _rows(rows, columns, seed)
    squares, totals = reference.row_sums(x)
    found = []
    for isa in ISAS:
        with forced(isa):
            found.append(ops.row_sums(x))
    for got, each in found:
        assert torch.equal(got, found[0][0])
        assert torch.equal(each, found[0][1])
    # 64 squares, or the values of a row, are added in float32
    assert torch.allclose(found[0][0], squares, rtol=64 * EPS)
    assert torch.equal(found[0][1][1:], totals[1:])
    assert abs(float(found[0][1][0] - totals[0])) <= columns * EPS * float(x.double().abs().sum())


def test_sums_over_rows_of_strange_values() -> None:
    x = torch.tensor([[1.0, math.nan], [math.inf, -2.0]])
    for squares, totals in (ops.row_sums(x), reference.row_sums(x)):
        assert squares.tolist()[0] == math.inf
        assert math.isnan(squares.tolist()[1])
        assert totals.tolist()[1:] == [-2.0, math.inf]


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 130), seed=st.integers(0, 1000))
def test_what_rounding_inputs_changes(rows: int, columns: int, seed: int) -> None:
    x, toward = _rows(rows, columns, seed), _rows(rows, columns, seed + 1)
    x[0] = 0.0
    found = []
    for isa in ISAS:
        with forced(isa):
            found.append(ops.input_changes(x, toward))
    assert all(torch.equal(each, found[0]) for each in found)
    for place, level in enumerate((4, 8)):
        codes, scale = quantize_input(x, level)
        error = (codes * scale - x).double() * toward.double()
        # sums in float32, of products whose factors were rounded; a value in the middle of two codes may take either
        size = (x.abs() * toward.abs()).double().sum(1)
        assert torch.allclose(found[0][place], error.sum(1), atol=float((4 * columns * EPS * size).max()) + 1e-30)


def test_the_reference_rounds_inputs_as_the_kernels_of_planes_do() -> None:
    x, toward = _rows(9, 70, 4), _rows(9, 70, 5)
    for place, level in enumerate((4, 8)):
        codes, scale = quantize_input(x, level)
        expected = ((codes * scale - x) * toward).sum(1, dtype=torch.float64)
        assert torch.allclose(reference.input_changes(x, toward)[place], expected, rtol=1e-4, atol=1e-4)


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(0, 5),
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    outputs=st.integers(1, 11),
    seed=st.integers(0, 1000),
)
def test_squared_gradients_of_samples(samples: int, rows: int, columns: int, outputs: int, seed: int) -> None:
    x = torch.randn(samples, rows, columns, generator=generator(seed))
    g = torch.randn(samples, rows, outputs, generator=generator(seed + 1))
    before = torch.rand(outputs, columns, generator=generator(seed + 2))
    expected = before.double() + torch.bmm(g.double().transpose(1, 2), x.double()).square().sum(0)
    found = []
    for isa in ISAS:
        with forced(isa):
            total = before.clone()
            ops.add_squared_gradients(total, x, g)
            found.append(total)
    assert all(torch.equal(each, found[0]) for each in found)
    size = torch.bmm(g.double().abs().transpose(1, 2), x.double().abs()).square().sum(0) + before.double()
    assert bool(((found[0].double() - expected).abs() <= 2 * (rows + samples + 2) * EPS * size).all())


@needs_kernels
def test_threads_change_nothing() -> None:
    x, g = _rows(900, 300, 1), torch.randn(30, 30, 40, generator=generator(2))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        total = torch.zeros(40, 300)
        ops.add_squared_gradients(total, x.view(30, 30, 300), g)
        found.append((*ops.row_sums(x), ops.input_changes(x, x.flip(0)), total))
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, found[0], strict=True))


@needs_kernels
def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="x has dtype"):
        ops.row_sums(x.double())
    with pytest.raises(RuntimeError, match="does not have 2 dimensions"):
        ops.row_sums(x[0])
    with pytest.raises(RuntimeError, match="is not of the shape of x"):
        ops.input_changes(x, x[:2])
    with pytest.raises(RuntimeError, match=r"are not \[B, T, K\]"):
        ops.add_squared_gradients(x, x[None], torch.ones(1, 3, 2))
    with pytest.raises(RuntimeError, match="total is not contiguous"):
        ops.add_squared_gradients(x.t(), torch.ones(1, 2, 3), torch.ones(1, 2, 4))


def test_opcheck() -> None:
    x = torch.randn(5, 40, generator=generator(1))
    torch.library.opcheck(ops.row_sums.default, (x,))
    torch.library.opcheck(ops.input_changes.default, (x, x.flip(0)))
    torch.library.opcheck(ops.add_squared_gradients.default, (torch.zeros(3, 40), x[None], torch.ones(1, 5, 3)))
