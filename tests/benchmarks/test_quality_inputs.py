"""The benchmark of inputs that choose, on a tiny Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.cases import Case
from benchmarks.quality import inputs
from foveate.collect.objectives import Logits
from foveate.kernels.backends.table import ensure_loaded
from tiny import generator, llama


def _texts(seed: int) -> list[Tensor]:
    return list(torch.randint(3, 50, (7, 16), generator=generator(seed)).split(4))


def _tiny(folder: Path, share: float) -> Case:
    return Case("tiny", llama(), _texts(1), _texts(2), Logits(), "loss", lambda y, _: y.logits[:, 0, 0], "next token")


@pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels")
def test_figures_of_a_tiny_model() -> None:
    measured = inputs.measure_models(Path(), 1.0, [_tiny], [5.0])
    (row,) = measured.rounds
    assert row["samples"] == 7 * 16
    assert row["ends"][0] < 4.9 < 5.1 < row["ends"][1]
    assert row["ends"][0] <= row["bits_read"] <= row["ends"][1] + 1e-6
    assert row["union_bits"] >= row["bits_read"] - 0.05
    assert row["interval"][0] <= row["kl"] / row["static_kl"] <= row["interval"][1]
    # all strips that differ are in the sample: the estimate is exact
    assert measured.figures["estimate_rank_correlation_tiny_b5"] == pytest.approx(1, abs=0.02)
    assert measured.figures["dynamic_over_static_kl"] == pytest.approx(row["kl"] / row["static_kl"])
    assert measured.figures["models_significant"] in (0, 1)
