"""`search_grids`: on every instruction set the grids are those of the reference, bit for bit, and they are good."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import FoveateError
from foveate.formats.grids import EXPONENTS, exponent_for, snapped
from foveate.kernels.rounding import grid_search as reference
from foveate.rounding.nearest import CLIP_PENALTIES, CLIP_PENALTIES_FOR_DESCENT
from kernels.cases import forced, isas
from tiny import generator

ISAS = isas()
search_grids = torch.ops.foveate.search_grids


def _weights(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    g = generator(seed)
    w = torch.randn(rows, columns, generator=g)
    if kind == "outliers":
        w *= torch.where(torch.rand(rows, columns, generator=g) < 0.02, 30.0, 1.0)
    elif kind == "shifted":
        w = 0.01 * w + 3.0
    elif kind == "flat":
        w = torch.full_like(w, 0.3) * (torch.arange(rows) % 3 - 1)[:, None]
    elif kind == "wide":
        w *= 10.0 ** torch.randint(-7, 4, (rows, columns), generator=g)
    elif kind == "grid":  # many equal costs
        w = w.mul(2).round().div(2)
    return w


def _exponent(w: Tensor) -> int:
    return exponent_for(2 * float(w.abs().max()) / 7.5)


@pytest.mark.skipif(not ISAS, reason="no compiled kernels: no C++ compiler was found")
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(("normal", "outliers", "shifted", "flat", "wide", "grid")),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    group=st.sampled_from((32, 64, 128)),
    penalties=st.sampled_from((CLIP_PENALTIES, CLIP_PENALTIES_FOR_DESCENT, (2.7, 31.4))),
    unused=st.booleans(),
    finer=st.integers(-3, 3),
    seed=st.integers(0, 1000),
)
def test_compiled_grids_are_those_of_the_reference(
    kind: str, rows: int, columns: int, group: int, penalties: tuple[float, float], unused: bool, finer: int, seed: int
) -> None:
    w = _weights(kind, rows, columns, seed)
    importance = torch.rand(columns, generator=generator(seed + 1)) ** 4
    if unused:
        importance[::3] = 0.0
    exponent = min(max(_exponent(w) - finer, EXPONENTS[0]), EXPONENTS[-1])
    wanted = reference.search_grids(w, importance, group, exponent, *penalties)
    for isa in ISAS:
        with forced(isa):
            assert torch.equal(search_grids(w, importance, group, exponent, *penalties), wanted), isa


@pytest.mark.parametrize("exponent", [EXPONENTS[0], -20, EXPONENTS[-1]])
def test_grids_are_as_they_can_be_stored(exponent: int) -> None:
    w = _weights("outliers", 21, 150, 3) * 2.0**exponent
    scale, offset = search_grids(w, torch.ones(150), 64, exponent, 2.0, 8.0)
    again = snapped(scale, offset, exponent)
    assert torch.equal(scale, again[0])
    assert torch.equal(offset, again[1])


def test_no_clip_or_shift_of_the_grids_is_better() -> None:
    w, importance = _weights("normal", 24, 256, 5), torch.rand(256, generator=generator(6))
    exponent = _exponent(w)
    found = search_grids(w, importance, 128, exponent, 2.0, 8.0)
    w_gR, importance_gR = reference.in_groups(w, importance, 128)

    def cost(scale: Tensor, offset: Tensor) -> Tensor:
        """The formula at the head of the reference, in float64."""
        v = (w_gR.double() - offset) / scale
        total = torch.full_like(v, (2 / 16 + 8 / 256) / 12)
        for step, most in ((1, 7.5), (2, 7), (4, 6)):
            code = ((v / step - (0.5 if step == 1 else most / step % 1)).round() + most / step % 1) * step
            total += ((v - code.clamp(-most, most)) / step).square()
        total += 10 * ((v.abs() - 8).clamp_min(0)).square()
        return (total * importance_gR).sum(0) * scale.square()

    scale, offset = (t.flatten().double() for t in found)
    best = cost(scale, offset)
    for clip in (0.8, 0.93, 1.08, 1.25):
        assert float((cost(scale * clip, offset) / best).mean()) > 1
    for shift in (-0.5, 0.5):
        assert float((cost(scale, offset + shift * scale) / best).mean()) > 1


def test_neither_threads_nor_other_rows_change_a_grid() -> None:
    w, importance = _weights("normal", 100, 700, 8), torch.rand(700, generator=generator(9))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(search_grids(w, importance, 128, 0, 4.0, 96.0))
    assert all(torch.equal(each, found[0]) for each in found)
    assert torch.equal(search_grids(w[37:53].contiguous(), importance, 128, 0, 4.0, 96.0), found[0][:, 37:53])


def test_the_op_passes_opcheck() -> None:
    torch.library.opcheck(search_grids.default, (torch.randn(5, 70), torch.rand(70), 32, 0, 2.0, 8.0))


@pytest.mark.skipif(not ISAS, reason="the reference does not check")
def test_arguments_that_do_not_fit_are_refused() -> None:
    w, importance = torch.randn(5, 70), torch.ones(70)
    for wrong in ((w.t().contiguous().t(), importance), (w.double(), importance), (w, importance[1:])):
        with pytest.raises(RuntimeError, match="not contiguous"):
            search_grids(*wrong, 32, 0, 2.0, 8.0)
    with pytest.raises(RuntimeError, match=r"group \(=48\)"):
        search_grids(w, importance, 48, 0, 2.0, 8.0)
    with pytest.raises(RuntimeError, match=r"exponent \(=33\)"):
        search_grids(w, importance, 32, 33, 2.0, 8.0)
    with pytest.raises(FoveateError, match=r"group \(=0\)"):
        search_grids(w.to("meta"), importance.to("meta"), 0, 0, 2.0, 8.0)
    assert search_grids(w[:0], importance, 32, 0, 2.0, 8.0).shape == (2, 0, 3)
