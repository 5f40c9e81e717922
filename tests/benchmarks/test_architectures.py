"""A slice of the table of architectures, and what the table says of models that are not as they should be."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from benchmarks import architectures
from benchmarks.architectures import FAMILIES, page
from benchmarks.architectures.families import Family
from benchmarks.architectures.trial import attempt
from foveate.bench.shared.result import finished

pytest.importorskip("transformers")


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def test_there_are_at_least_twenty_families_of_transformers_and_their_names_are_one_each() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert sum(not family.skeleton for family in FAMILIES) >= 20
    assert sum(family.skeleton for family in FAMILIES) >= 10


@pytest.mark.parametrize("name", ["Qwen2", "GPT-2", "BERT", "Conv2d, BatchNorm2d"])
def test_families_that_work(name: str) -> None:
    found = attempt(_family(name))
    assert (found.status, found.says) == ("works", "")
    assert list(found.errors) == [8, 6, 4, 3, 2]
    assert found.errors[8] < 0.05 < found.errors[2]


def test_what_stays_float_is_named_with_its_share() -> None:
    found = attempt(_family("EmbeddingBag"))
    assert (found.status, found.says) == ("partly", "`0.weight` (EmbeddingBag)")
    assert found.float_share == pytest.approx(60 * 32 / (60 * 32 + 32 * 8))


def _broken(forward: Any, **changes: Any) -> Family:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = forward(self, x)
            return result

    batch = lambda seed: torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    return Family(name="broken", kind="test", make=Broken, batch=batch, skeleton=True, **changes)


def test_a_model_that_fails_by_itself_is_not_tried() -> None:
    found = attempt(_broken(lambda self, x: x @ torch.ones(3)))
    assert found.status == "not tried"
    assert found.says.startswith("running the float model: RuntimeError")


def test_an_error_that_is_not_ours_is_a_failure() -> None:
    family = _broken(lambda self, x: self.layer(x))
    makers = [family.make]  # the second model, which is to be loaded into, cannot be made
    found = attempt(replace(family, make=lambda: makers.pop()()))
    assert (found.status, found.step) == ("FAILED", "saving and loading")
    assert "IndexError" in found.says


def test_a_refusal_is_its_sentence() -> None:
    found = attempt(Family(name="none", kind="test", make=nn.Identity, batch=lambda seed: torch.ones(2), skeleton=True))
    assert found.status == "refused"
    assert found.says.startswith("quantizing: Identity has no weight that can be quantized")


def test_a_process_that_ends_is_a_failure_and_the_next_family_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_work", os._exit)  # an int is asked for, a pipe is given: it ends at once
    worker = architectures._Worker()
    found = worker.attempt(_family("Linear"))
    assert found.status == "FAILED"
    assert found.says.startswith("the process ended with code")
    monkeypatch.undo()
    assert worker.attempt(_family("Linear")).status == "works"
    worker.stop()


def test_the_table_has_a_line_for_each() -> None:
    result = finished("architectures", architectures.measure(only=("Linear", "EmbeddingBag"), progress=False))
    assert result["figures"] == {"works": 1, "partly": 1, "refused": 0, "FAILED": 0, "not tried": 0}
    text = page(result)
    assert "| Linear | works |  |  | 0.0" in text
    assert "| EmbeddingBag | partly | 88.2 % | `0.weight` (EmbeddingBag) |" in text
    assert "torch " in text
    with pytest.raises(fv.FoveateError, match="Lama"):
        architectures.measure(only=("Lama",))
