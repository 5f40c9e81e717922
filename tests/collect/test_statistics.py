"""Statistics against the same numbers by autograd, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.collect.collector import Collector
from foveate.collect.kinds import Kind, find_weights, kind_of, patches, weight_matrix, weight_matrix_shape
from foveate.collect.objectives import Custom, Embedding, Logits, run
from foveate.collect.statistics import Factored
from foveate.errors import DataError
from tiny import generator, mlp, rows


def _collect(model: nn.Module, batches: list[Any], objective: Any) -> Collector:
    collector = Collector(find_weights(model), objective)
    model.requires_grad_(False)
    for batch in batches:
        collector.add(model, batch)
    return collector


def _loss_of(objective: Any, index: int = 0) -> Callable[[Any, Any], Tensor]:
    return lambda output, batch: objective.loss(output, batch, torch.Generator().manual_seed(index))[0]


def test_factors_are_the_energies_of_inputs_and_gradients() -> None:
    model = mlp((6, 5, 4))
    (x,) = rows(7, 6, 1)
    collector = _collect(model, [x], Logits())

    first, second = model[0], model[2]
    a = first(x).detach().requires_grad_()
    h = torch.relu(a)
    z = second(h)
    g_a, g_z = torch.autograd.grad(_loss_of(Logits())(z, x), (a, z))
    expected = {"0": (g_a, x), "2": (g_z, h.detach())}
    for name, (g, inputs) in expected.items():
        fisher = collector.by_module[name].fisher(collector.samples)
        assert isinstance(fisher, Factored)
        assert torch.allclose(fisher.gradient_N, g.square().mean(0), rtol=1e-5)
        assert torch.allclose(fisher.energy_K, inputs.square().mean(0), rtol=1e-5)
    assert collector.samples == 7
    limits = collector.by_module["0"].tensors["output_range"]
    assert limits.tolist() == [float(a.detach().min()), float(a.detach().max())]


def test_covariances_are_those_of_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False)
    (x,) = rows(7, 6, 1)
    collector = Collector(find_weights(model), Logits(), held=["0", "4"])
    collector.add(model, x)
    for name, inputs in (("0", x), ("4", model[:4](x))):
        fisher = collector.by_module[name].fisher(7)
        assert isinstance(fisher, Factored)
        covariance_KK = collector.by_module[name].covariance()
        assert covariance_KK is not None
        assert torch.allclose(covariance_KK, inputs.t() @ inputs / 7, atol=1e-6)
        assert torch.allclose(covariance_KK.diagonal(), fisher.energy_K, atol=1e-6)
    assert collector.by_module["2"].covariance() is None
    assert collector.by_module["2"].large_bytes == 4 * 5 * 5
    assert collector.by_module["2"].gradients() is None


def _per_sample_fisher(model: nn.Module, name: str, x: Tensor, loss: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """The mean over samples of the squared gradient, one sample at a time."""
    weight = model.get_submodule(name).weight
    weight.requires_grad_(True)
    total = torch.zeros(weight.shape)
    for i in range(len(x)):
        (g,) = torch.autograd.grad(loss(model(x[i : i + 1]), x[i : i + 1]), weight)
        total += g.square()
    weight.requires_grad_(False)
    return total / len(x)


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "stride and padding": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)),
    "dilation": lambda: nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="circular"),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "one-dimensional": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "one-dimensional groups": lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2),
}


@pytest.mark.parametrize("what", CONVOLUTIONS)
def test_fisher_of_a_convolution_is_that_of_each_sample(what: str) -> None:
    torch.manual_seed(0)
    conv = CONVOLUTIONS[what]()
    model = nn.Sequential(conv, nn.Flatten(1)).requires_grad_(False)
    x = torch.randn(5, 4, *([9, 8] if isinstance(conv, nn.Conv2d) else [17]))

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return (output.square() * torch.linspace(0.1, 1, output.shape[1])).sum()

    collector = _collect(model, [x[:2], x[2:]], Custom(loss, Embedding()))
    got = collector.by_module["0"].fisher(collector.samples)
    assert isinstance(got, Tensor)
    expected = _per_sample_fisher(model, "0", x, loss).flatten(1)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert got.shape == weight_matrix_shape(conv)


@pytest.mark.parametrize("what", CONVOLUTIONS)
def test_patches_times_filters_is_the_convolution(what: str) -> None:
    torch.manual_seed(0)
    conv = CONVOLUTIONS[what]()
    x = torch.randn(3, 4, *([9, 8] if isinstance(conv, nn.Conv2d) else [17]))
    w = weight_matrix(conv).view(conv.groups, -1, weight_matrix_shape(conv)[1])
    y = torch.einsum("gnk,bgkp->bgnp", w, patches(conv, x)).flatten(1, 2)
    expected = conv(x).detach()
    if conv.bias is not None:
        y = y + conv.bias.detach()[:, None]
    assert torch.allclose(y.view_as(expected), expected, atol=1e-5)


def test_fisher_of_tokens_that_share_a_loss_is_that_of_each_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(3, 7, 6)

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output.sum(1).square().sum()

    collector = _collect(model, [x], Custom(loss, Embedding()))
    for name in ("0", "2"):
        got = collector.by_module[name].fisher(1)
        assert isinstance(got, Tensor)
        expected = _per_sample_fisher(model, name, x, loss) * 3
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


class _Changed(nn.Module):
    """Changes a layer's output, or its input, in place."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.what = nn.Linear(6, 6), nn.Linear(6, 4), what

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        if self.what == "output":
            h = F.relu_(self.first(x))
        elif self.what == "input":
            h = self.first(x)
            x.add_(h)
            h = torch.relu(x)
        elif self.what == "output, not in place":
            h = torch.relu(self.first(x))
        else:
            h = torch.relu(x + self.first(x))
        return self.second(h)


@pytest.mark.parametrize("what", ["output", "input"])
@pytest.mark.parametrize("independent", [False, True])
def test_changes_in_place_do_not_change_the_statistics(what: str, independent: bool) -> None:
    x = torch.randn(5, 6, generator=generator(1))

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output.square().sum()

    objective = Logits() if independent else Custom(loss, Embedding())
    changed = _collect(_Changed(what), [x], objective)
    plain = _collect(_Changed(f"{what}, not in place"), [x], objective)
    for name in ("first", "second"):
        for key, t in plain.by_module[name].tensors.items():
            assert torch.allclose(changed.by_module[name].tensors[key], t, rtol=1e-5), key


def test_a_module_used_twice_counts_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice()
    x = torch.randn(5, 4)
    collector = _collect(model, [x], Logits())
    h = torch.tanh(model.layer(x))
    seen = collector.by_module["layer"]
    assert float(seen.tensors["rows"]) == 10
    assert torch.allclose(seen.tensors["energy_K"].float(), x.square().sum(0) + h.square().sum(0), rtol=1e-5)


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_embeddings_count_how_often_each_row_is_read() -> None:
    model = _Words()
    ids = torch.tensor([[1, 1, 3], [3, 1, 9]])
    collector = _collect(model, [ids], Logits())
    seen = collector.by_module["embed"]
    assert seen.tensors["frequency_N"].tolist() == [0, 3, 0, 2, 0, 0, 0, 0, 0, 1]
    e = model.embed(ids).detach().requires_grad_()
    (g,) = torch.autograd.grad(_loss_of(Logits())(model.head(e), ids), e)
    fisher = seen.fisher(collector.samples)
    assert isinstance(fisher, Factored)
    frequency = fisher.gradient_N
    assert torch.allclose(fisher.energy_K, g.square().mean((0, 1)), rtol=1e-5)
    # half a count for rows never met; all counts together are the tokens of a sample
    assert float(frequency.sum()) == pytest.approx(6 / 6, rel=1e-6)
    assert float(frequency[0]) == pytest.approx(float(frequency[9]) / 3, rel=1e-6)
    assert seen.input_energy() is None


def test_padding_is_left_out() -> None:
    class Batched(_Words):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:  # type: ignore[override]
            return type("Output", (), {"logits": super().forward(input_ids)})()

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    collector = _collect(
        Batched(), [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask}], Logits()
    )
    assert collector.samples == 3


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    batches = rows(40, 70, 5)
    whole = _collect(mlp(), batches, Logits())
    part = _collect(mlp(), batches[:2], Logits())
    model = mlp()
    resumed = Collector(find_weights(model), Logits())
    resumed.restore(part.state())
    model.requires_grad_(False)
    for batch in batches[2:]:
        resumed.add(model, batch)
    expected = whole.state()
    assert {k: t.dtype for k, t in resumed.state().items()} == {k: t.dtype for k, t in expected.items()}
    assert all(torch.equal(t, expected[k]) for k, t in resumed.state().items())


def test_the_state_of_another_model_is_refused() -> None:
    collector = Collector(find_weights(mlp((70, 40, 11))), Logits())
    with pytest.raises(DataError, match="made for another model or objective"):
        collector.restore(_collect(mlp(), rows(), Logits()).state())
    with pytest.raises(DataError, match="made for another model or objective"):
        Collector(find_weights(mlp()), Embedding()).restore(_collect(mlp(), rows(), Logits()).state())


@pytest.mark.parametrize("objective", [Logits(), Embedding()])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_named(objective: Any, bad: float) -> None:
    batches = rows(20, 70, 2)
    batches[1][3, 5] = bad
    model = mlp()
    with pytest.raises(DataError, match="batch 1 gives a loss that is not finite"):
        _collect(model, batches, objective)
    assert not any(m._forward_hooks for m in model.modules())


def test_an_empty_batch_is_an_error() -> None:
    model = _Words()
    with pytest.raises((DataError, RuntimeError)):
        _collect(model, [torch.zeros(2, 0, dtype=torch.long)], Logits())


def test_weights_used_without_gradients_are_an_error() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.first(x)
            return self.second(x)

    with pytest.raises(DataError, match=r"first runs without gradients"):
        _collect(Hidden(), [torch.randn(3, 4)], Logits())


def test_keyword_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(input=x)
            return y

    assert float(_collect(Named(), [torch.randn(3, 4)], Logits()).by_module["layer"].tensors["rows"]) == 3


def test_what_is_never_reached_is_named() -> None:
    model = mlp((6, 5, 4))
    model.add_module("unused", nn.Identity())
    model[0].add_module("inner", nn.Linear(3, 3))  # never called
    collector = _collect(model, [torch.randn(3, 6)], Logits())
    assert collector.unseen() == ["0.inner"]


def test_kinds() -> None:
    from torch.nn.utils.parametrizations import weight_norm
    from transformers.pytorch_utils import Conv1D

    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    assert kind_of(nn.Linear(2, 2)) is Kind.LINEAR
    assert kind_of(Named(2, 2)) is Kind.LINEAR
    assert kind_of(Conv1D(3, 2)) is Kind.LINEAR_TRANSPOSED
    assert kind_of(nn.Embedding(2, 2)) is Kind.EMBEDDING
    assert kind_of(nn.Conv1d(2, 2, 1)) is Kind.CONV
    for left in (
        Louder(2, 2),
        weight_norm(nn.Linear(2, 2)),
        nn.Embedding(2, 2, max_norm=1.0),
        nn.LayerNorm(2),
        nn.Conv3d(1, 1, 1),
    ):
        assert kind_of(left) is None
    assert find_weights(nn.MultiheadAttention(4, 2)) == []
    assert weight_matrix(Conv1D(3, 2)).shape == weight_matrix_shape(Conv1D(3, 2)) == (3, 2)


def test_tied_weights_are_found_once() -> None:
    model = _Words()
    model.head.weight = model.embed.weight
    (found,) = find_weights(model)
    assert found.names == ("embed", "head")
    assert not found.is_embedding_only


def test_batches_are_passed_as_they_are() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    one, two = torch.tensor(3.0), torch.tensor(1.0)
    for batch in ({"b": two, "a": one}, (one, two), [one, two]):
        assert float(run(Two(), batch)) == 2
