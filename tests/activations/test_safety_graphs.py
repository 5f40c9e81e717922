"""Graphs of all kinds in a store: edits in place, views, second passes, several at once, and none left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import equal, errors, exact, gradients, hooks, most_error, small_model
from torch import Tensor, nn

import foveate as fv
from foveate.activations.forms.identity import Interval, StorageIndex, interval_of

# --- edits in place


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.mul_(2),
        lambda h: h.view(-1)[3:5].zero_(),
        lambda h: h.detach().add_(1),
        lambda h: h.t()[0].fill_(1.0),
    ],
)
def test_an_edit_after_saving_raises(edit: Callable[[Tensor], Any], settings: dict[str, Any]) -> None:
    model = nn.Linear(16, 16)
    h = model(torch.randn(8, 16))
    with pytest.raises(RuntimeError, match="inplace"):  # plain autograd, to compare
        _edited(h, edit)
    with (
        fv.compress_activations(model, **settings),
        pytest.raises(RuntimeError, match=r"inplace operation.*version"),
    ):
        _edited(model(torch.randn(8, 16)), edit)


def _edited(h: Tensor, edit: Callable[[Tensor], Any]) -> None:
    out = h * h
    with torch.no_grad():
        edit(h)
    out.sum().backward()


def test_an_edit_of_what_cannot_be_stored_raises_too() -> None:
    with exact(nn.Linear(2, 2)):
        h = torch.randn(4, requires_grad=True) * torch.complex(torch.ones(4), torch.ones(4))
        out = h * h
        with torch.no_grad():
            h.mul_(2)
        with pytest.raises(RuntimeError, match="inplace"):
            out.abs().sum().backward()


def test_a_step_of_the_optimizer_before_backward_raises(settings: dict[str, Any]) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(8, 16)).sum().backward()
    with fv.compress_activations(model, **settings):
        loss = model(torch.randn(8, 16)).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()
    assert not hooks(model)


def test_data_is_not_looked_at_as_in_plain_autograd() -> None:
    def gradient() -> Tensor:
        x = torch.ones(8, requires_grad=True)
        h = x * 2
        out = h * h
        h.data.mul_(3)
        return torch.autograd.grad(out.sum(), x)[0]

    wanted = gradient()
    with exact(nn.Linear(2, 2)):
        assert torch.equal(wanted, gradient())


def test_a_clone_of_a_parameter_that_was_written_to_is_not_the_parameter() -> None:
    weight = nn.Parameter(torch.randn(8, 8))

    def gradient(copied: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.ones(4, 8, requires_grad=True)
        made = copied(weight)
        made.data.round_()  # straight-through quantization
        return torch.autograd.grad((x.to(made.dtype) @ made).float().sum(), x)[0]

    copies: list[Callable[[Tensor], Tensor]] = [torch.clone, lambda w: w.to(torch.bfloat16), lambda w: w.t().clone()]
    for copied in copies:
        wanted = gradient(copied)
        with fv.compress_activations(nn.ParameterList([weight]), levels=32, options=fv.ActivationOptions(smallest=1)):
            assert torch.equal(wanted, gradient(copied))


# --- views


def _chunks(x: Tensor) -> Tensor:
    q, k, v = (0.2 * x @ torch.ones(8, 24)).chunk(3, -1)
    return (q * k + k * v).tanh() * q


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "gram": lambda x: x.t() @ x,
    "chunks": _chunks,
    "expand": lambda x: x.sum(0, keepdim=True).exp().expand(5, 8) * x[:5].exp().expand(5, 8),
    "expand, with gaps": lambda x: (x.exp()[:, :3].unsqueeze(0).expand(4, 12, 3) * 2).square(),
    "overlap": lambda x: x.exp().as_strided((8, 8), (4, 1)).square() + x.exp().as_strided((8, 8), (4, 1), 3),
    "overlap and gaps": lambda x: x.exp().as_strided((2, 2, 2), (1, 1, 5)).square() * x[0, 0],
    "one storage, two offsets": lambda x: x.view(-1)[:48].tanh() * x.view(-1)[48:].tanh() * x.exp().view(-1)[2:50],
    "reversed": lambda x: x.exp().flip(0).t().square().t() * x,
    "diagonal": lambda x: x.exp().diagonal().square(),
    "a small part": lambda x: x.exp()[:1, :2].square(),
    "a view of another dtype": lambda x: x * x.detach().view(torch.int32).bitwise_and(1).float(),
    "saved whole after a part": lambda x: (lambda h: h[:3].square().sum() * h.square())(x.exp()),
    "saved turned": lambda x: (lambda h: h.square() * h.t().contiguous().t() * h.t().square().t())(x.exp()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    leaf = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def gradient() -> Tensor:
        out = VIEWS[name](leaf * 1)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        return torch.autograd.grad(out, leaf, weights)[0]

    wanted = gradient()
    for _ in range(2):
        with exact(nn.Linear(2, 2)):
            assert torch.equal(wanted, gradient())
    errors = []
    for seed in range(8):
        with fv.compress_activations(
            nn.Linear(2, 2), levels=8, options=fv.ActivationOptions(smallest=1, group=32, seed=seed)
        ):
            errors.append(gradient() - wanted)
    assert torch.stack(errors).norm(dim=(1, 2)).mean() < 0.1 * wanted.norm()


def test_an_overlapping_tensor_is_stored_as_its_run() -> None:
    x = torch.randn(100)
    windows = x.unfold(0, 20, 1)
    assert interval_of(windows) == Interval(0, 100, True)
    assert interval_of(x[:3].expand(50, 3)) == Interval(0, 3, True)
    assert not interval_of(x.view(10, 10)[:, :3]).dense


def test_memory_that_is_used_again_is_not_taken_for_what_it_was() -> None:
    leaf = torch.randn(1024, requires_grad=True)
    weight = nn.Parameter(torch.randn(1024))

    def step(number: int) -> Tensor:
        kept = []
        for i in range(40):
            h = leaf * float(number + i)
            kept.append((h * h.tanh() * weight).sum())
            if i % 3 == 0:
                kept.pop()  # its memory goes back
            del h
        return torch.autograd.grad(torch.stack(kept).sum(), leaf)[0]

    wanted = [step(n) for n in range(6)]
    store = fv.compress_activations(nn.ParameterList([weight]), levels=32, options=fv.ActivationOptions(smallest=1))
    with store:
        found = [step(n) for n in range(6)]
    assert equal(wanted, found)
    assert store._index.empty


def test_an_index_forgets_items_that_were_freed() -> None:
    class Item:
        pass

    index: StorageIndex[Item] = StorageIndex()
    for i in range(200):
        x = torch.full((256,), float(i))
        assert index.find(x, interval_of(x), lambda _: True) is None
        item = Item()
        index.put(x, interval_of(x), item)
        assert index.find(x, interval_of(x), lambda _: True) is item
        del item
    assert index.empty


# --- second passes and several graphs


def test_backward_twice_gives_the_same(settings: dict[str, Any]) -> None:
    model = small_model()
    with fv.compress_activations(model, **settings):
        loss = model(torch.randn(8, 16)).square().mean()
        loss.backward(retain_graph=True)
        first = gradients(model)
        loss.backward()
    assert equal(first, gradients(model))


def _penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return slope.square().sum()


def test_double_backward() -> None:
    model, x = small_model(), torch.randn(8, 16)
    _penalty(model, x).backward()
    wanted = gradients(model)
    with exact(model):
        _penalty(model, x).backward()
    assert equal(wanted, gradients(model))
    for lossy in ({"levels": 8}, {"error": 0.1}):
        with fv.compress_activations(model, **lossy, options=fv.ActivationOptions(smallest=1, group=32)):  # type: ignore[arg-type]
            _penalty(model, x).backward()
        for w, f in zip(wanted, gradients(model), strict=True):
            assert (w - f).norm() < 0.1 * w.norm() + 1e-4


def test_graphs_alive_at_once_and_accumulation() -> None:
    model, batches = small_model(), torch.randn(4, 8, 16)

    def run() -> list[Tensor]:
        losses = [model(x).square().mean() for x in batches[:3]]
        losses[1].backward()
        losses.append(model(batches[3]).square().mean())
        for i in (3, 0, 2):
            losses[i].backward()
        return gradients(model)

    wanted = run()
    with exact(model):
        assert equal(wanted, run())
    with fv.compress_activations(model, error=0.1, options=fv.ActivationOptions(smallest=1)):
        for _ in range(3):
            found = run()
    for w, f in zip(wanted, found, strict=True):
        assert (w - f).norm() < 0.2 * w.norm() + 1e-4


def test_backward_outside(settings: dict[str, Any]) -> None:
    model, x = small_model(), torch.randn(8, 16)
    model(x).square().mean().backward()
    wanted = gradients(model)
    with fv.compress_activations(model, **settings):
        loss = model(x).square().mean()
    loss.backward()
    found = gradients(model)
    assert not hooks(model)
    assert errors(wanted, found) <= most_error(settings)
    assert equal(wanted, found) == (settings.get("levels") == 32)


def test_what_a_node_holds_can_be_looked_at(settings: dict[str, Any]) -> None:
    model = nn.Linear(16, 16)
    with fv.compress_activations(model, **settings) as store:
        y = torch.tanh(model(torch.randn(8, 16)))
        held: Any = y.grad_fn
        assert held._saved_result.shape == y.shape
        assert store.steps == 0
        y.sum().backward()
        assert store.steps == 1
