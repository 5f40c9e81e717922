"""The benchmark of inputs that choose, on a tiny Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveate as fv
from benchmarks.models.cases import Case
from benchmarks.quality import inputs, switches
from foveate.collect.objectives import Logits
from foveate.errors import FoveateError
from foveate.inputs.gradients import products_of
from foveate.kernels.backends.table import ensure_loaded
from tiny import generator, llama, quantized_llama, tokens


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


@pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels")
def test_switches_of_a_tiny_model() -> None:
    names = ["feedback", "grouped", "static-scales", "zero-point", "inputs-16", "bytes"]
    measured = switches.measure_switches(Path(), 1.0, [_tiny], [5.0], names)
    assert [row["switch"] for row in measured.rounds] == ["plain", *names]
    for row in measured.rounds:
        assert row["bits_read"] == pytest.approx(5.0, abs=0.05)
        assert row["samples"] == 7 * 16
        assert row["interval"][0] <= row["kl"] / row["static_kl"] <= row["interval"][1]
    assert measured.figures["plain_over_plain_kl"] == 1
    # a token of this model reads all of its weights, so that bytes price weights as bits do
    assert measured.figures["bytes_over_plain_kl"] == pytest.approx(1, abs=0.05)
    with pytest.raises(FoveateError, match=r"switch \(='other'\) is not one of feedback, grouped"):
        switches.measure_switches(Path(), 1.0, [_tiny], [5.0], ["other"])
    with pytest.raises(FoveateError, match=r"model \(='other'\) is not one of stories260k"):
        inputs.measure(models=["other"])


@pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels")
def test_groups_of_one_decide_as_the_op_does() -> None:
    """The hooks that stand for a switch in the op compute its very products."""
    model, _ = quantized_llama()
    options = fv.AdaptOptions(verdict=False)
    ids = tokens(8, 12, 4)[0]["input_ids"]

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    with fv.adapt_to_input(model, bits=5.0, batches=tokens(8, 12, 4), options=options, progress=False):
        whole = logits()
        # a hook for the plain products too, since without any all blocks are one op, which rounds otherwise
        hooks = [layer.register_forward_hook(lambda *_: None) for layer in products_of(model).values()]
        plain = logits()
        alone = {layer.weight.name: (layer,) for layer in products_of(model).values()}
        with switches.together(model, alone):
            assert torch.equal(logits(), plain)
        groups = switches.groups_of(model)
        assert [len(layers) for layers in groups.values()] == [3, 2] * 2
        with switches.together(model, groups):
            assert not torch.equal(logits(), plain)
        for hook in hooks:
            hook.remove()
        assert torch.equal(logits(), whole)
