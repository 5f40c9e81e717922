"""Models on planes refuse what would store them without their weights, and say what to call."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.nn.registry import detach
from tiny import llama, quantized_llama, tokens

ADVICE = r"foveate\.save\(model, folder\)"


def _models(tmp_path: Path) -> dict[str, Any]:
    model, _ = quantized_llama()
    fv.save(model, tmp_path / "out")
    return {
        "quantized": model,
        "a part of it": model.model,
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "loaded": fv.load(tmp_path / "out"),
        "in a wrapper": nn.ModuleDict({"inner": model})["inner"],
    }


def test_save_pretrained_and_push_to_hub_are_refused(tmp_path: Path) -> None:
    for what, model in _models(tmp_path).items():
        for call in (model.save_pretrained, model.push_to_hub):
            with pytest.raises(fv.FoveateError, match=ADVICE):
                call(str(tmp_path / "pretrained"))
        assert not (tmp_path / "pretrained").exists(), what
    llama().save_pretrained(tmp_path / "pretrained")  # nobody else's is refused


def test_quantized_inside_of_a_model_that_was_wrapped_first(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, **batch: torch.Tensor) -> Any:
            return self.inner(**batch)

    model = Wrapped()
    fv.quantize(model, tokens(), progress=False)
    with pytest.raises(fv.FoveateError, match=ADVICE):
        model.inner.save_pretrained(tmp_path / "pretrained")


def test_a_model_that_is_no_longer_on_planes_can_be_saved(tmp_path: Path) -> None:
    model, _ = quantized_llama()
    detach(model)
    assert "save_pretrained" not in model.__dict__
    assert "save_pretrained" not in model.model.__dict__


def test_the_trainers_checkpoints_are_refused(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = quantized_llama()
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True))
    with pytest.raises(fv.FoveateError, match=ADVICE):
        trainer.save_model()
