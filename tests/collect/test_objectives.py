"""Objectives: their losses, divergences and agreement."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.collect.objectives import Embedding, Logits, infer, run
from foveate.errors import DataError
from tiny import generator


def test_the_loss_of_logits_has_their_fisher_information_as_its_squared_gradient() -> None:
    z = torch.randn(1, 5, generator=generator(3)).mul(2)
    p = z.softmax(-1)[0]
    repeated = z.expand(40_000, 5).clone().requires_grad_()
    loss, samples = Logits().loss(repeated, None, generator(4))
    (g,) = torch.autograd.grad(loss, repeated)
    assert samples == 40_000
    expected = p.diag() - p[:, None] * p
    # a mean over 40000 draws, each with a variance of about twice the square
    assert torch.allclose(g.t() @ g / samples, expected, atol=5 * 2**0.5 * float(expected.max()) / 200)


def test_classes_that_are_ruled_out_do_no_harm() -> None:
    z = torch.randn(4, 5)
    z[:, 2] = -float("inf")
    z.requires_grad_()
    loss, _ = Logits().loss(z, None, generator(4))
    (g,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(loss.detach())
    assert torch.isfinite(g).all()
    assert float(g[:, 2].abs().max()) == 0


def test_objectives() -> None:
    output = type("Output", (), {"logits": torch.randn(2, 5)})()
    assert isinstance(infer(output), Logits)
    assert isinstance(infer(torch.randn(2, 5)), Embedding)
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(Logits().divergence(a, b), kl, atol=1e-6)
    assert torch.allclose(Logits().divergence(a, a), torch.zeros(6))
    assert torch.allclose(Embedding().divergence(a, 3 * a), torch.zeros(6), atol=1e-6)
    assert torch.allclose(Embedding().divergence(a, -a), torch.full((6,), 2.0))
    assert Logits().agreement(a, a + 1).all()
    assert Embedding().agreement(a, 2 * a).all()
    with pytest.raises(DataError, match="without a tensor"):
        Logits().outcome(["text"], None)


def test_of_a_tuple_the_first_tensor_with_dimensions_is_compared() -> None:
    loss, rows, states = torch.tensor(1.5), torch.randn(2, 3, 4), torch.randn(1, 2, 5)
    for objective in (Logits(), Embedding()):
        assert torch.equal(objective.outcome((rows, states), None), rows.flatten(0, 1))
        assert torch.equal(objective.outcome((loss, rows), None), rows.flatten(0, 1))
        assert torch.equal(objective.outcome({"loss": loss, "out": rows}, None), rows.flatten(0, 1))
        reference, outcome = (objective.outcome(one, None) for one in ((loss, rows), (loss, 2 * rows)))
        assert objective.agreement(reference, outcome).all()
        for nothing in ((), (loss,), {}, object()):
            with pytest.raises(DataError, match="without a tensor of rows"):
                objective.outcome(nothing, None)
        with pytest.raises(DataError, match="a single number"):
            objective.outcome(loss, None)


def test_outputs_that_are_mappings_are_read_by_their_keys() -> None:
    tokens, sentence = torch.randn(2, 3, 4), torch.randn(2, 4)
    output = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "token_embeddings": tokens}
    assert torch.equal(Embedding().outcome({**output, "sentence_embedding": sentence}, ()), sentence)
    assert isinstance(infer({"logits": sentence}), Logits)
    assert torch.equal(Logits().outcome({"mask": tokens, "logits": sentence}, ()), sentence)


class _Adding(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        features["sentence_embedding"] = 2 * features["x"]
        return features


def test_a_mapping_among_positions_is_not_written_to() -> None:
    features = {"x": torch.randn(2, 4)}
    assert torch.equal(Embedding().outcome(run(_Adding(), (features,)), ()), 2 * features["x"])
    assert list(features) == ["x"]
