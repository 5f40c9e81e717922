"""What a profile notes of its calibration."""

from __future__ import annotations

import torch
from torch import nn

import foveate as fv
from tiny import llama, mlp, rows, tokens


def test_what_calibration_never_reached_is_noted() -> None:
    model = mlp()
    model.add_module("5", nn.Linear(10, 10))
    model.forward = lambda x: nn.Sequential(*list(model)[:5])(x)  # type: ignore[method-assign]
    profile = fv.quantize(model, rows(), progress=False)
    assert any("calibration never reached 5" in note for note in profile.notes)


def test_a_note_says_how_many_rows_descent_would_have_needed() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    profile = fv.quantize(model, [torch.randn(40, 64)], objective=fv.Logits(), progress=False)
    (note,) = [note for note in profile.notes if "fewer rows" in note]
    assert note.startswith("0 (40 rows, 64 columns) had fewer rows of input than columns")


def test_a_tied_embedding_that_saw_few_rows_is_noted() -> None:
    profile = fv.quantize(llama(tie_word_embeddings=True), tokens(1, 5, batches=1), progress=False)
    (note,) = [note for note in profile.notes if "fewer rows" in note]
    assert "model.embed_tokens (5 rows, 32 columns)" in note
