"""The benchmark of the decision, at tiny sizes."""

from __future__ import annotations

import pytest
import torch

from foveate.bench import inputs
from foveate.kernels.backends.table import ensure_loaded
from tiny import generator

SIZES = inputs.Sizes(widths=(128, 256), set_bytes=1, rounds=3, threads=1)


@pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels")
def test_figures_of_tiny_layers() -> None:
    measured = inputs.measure(SIZES)
    assert {row["width"]: len(row["seconds"]) for row in measured.rounds} == {128: 3, 256: 3}
    names = {f"overhead{kind}_n{width}" for kind in ("", "_best") for width in (128, 256)}
    assert set(measured.figures) == names
    assert all(figure > 0 for figure in measured.figures.values())


def test_ranks() -> None:
    x = torch.randn(100, generator=generator(0))
    assert inputs.spearman(x, x.exp()) == pytest.approx(1)
    assert inputs.spearman(x, -x) == pytest.approx(-1)
    assert abs(inputs.spearman(x, torch.randn(100, generator=generator(1)))) < 0.3
    assert inputs.spearman(x[:1], x[:1]) == 1.0
