"""The examples run, small."""

from __future__ import annotations

import pytest


def test_training_in_less_memory_learns_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from examples.train_in_less_memory import train

    losses = train(12, 0.3, width=32, layers=1, batch=2, length=32)
    assert losses[-1] < losses[0]
    said = capsys.readouterr().out
    assert "step 0: loss 5." in said
    assert "kept in" in said
    assert "within the bound" in said
