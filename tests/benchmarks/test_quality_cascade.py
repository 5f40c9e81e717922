"""The benchmark of cascades, on a tiny classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.cases import Case
from benchmarks.quality import cascade
from foveate.collect.objectives import Logits
from tiny import generator, mlp


def _inputs(count: int, seed: int) -> list[Tensor]:
    return list(torch.randn(count, 70, generator=generator(seed)).split(16))


def _tiny(folder: Path, share: float) -> Case:
    return Case("tiny", mlp(), _inputs(128, 1), _inputs(256, 2), Logits(), "top1", lambda y, _: y[:, 0], "class")


def test_figures_of_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade, "_CLASSIFIERS", (_tiny,))
    monkeypatch.setattr(cascade, "augmented_images", lambda folder, share: _inputs(2000, 3))
    monkeypatch.setattr(cascade, "AGREEMENT", 0.97)
    monkeypatch.setattr(cascade, "ADAPT_BITS", 5.0)
    monkeypatch.setattr(cascade, "sentences", lambda folder, share: _tiny(folder, share))
    measured = cascade.measure_models(Path())
    (row,) = measured.rounds
    assert row["cascade_bits_ratio"] == pytest.approx(row["cascade_bits"] / row["static_bits"])
    assert 0.94 < row["cascade_agreement"] <= 1
    assert 0.94 < row["static_agreement"] <= 1
    assert 0 <= row["cascade_share"] <= 1
    assert measured.figures["cascade_bits_ratio"] == row["cascade_bits_ratio"]
    assert measured.figures["adapt_ratio_tiny"] <= measured.figures["adapt_high_tiny"]
    assert len(measured.notes) == 2
