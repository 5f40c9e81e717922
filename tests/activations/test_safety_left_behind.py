"""What a store leaves behind: nothing. Failures, two stores, threads, and memory that goes with its graph."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_training import equal, exact, gradients, hooks, small_model
from torch import Tensor, nn

import foveate as fv
from foveate.activations.forms.identity import Interval


def test_failures_leave_the_store_usable_and_nothing_behind(settings: dict[str, Any]) -> None:
    model, x = small_model(), torch.randn(8, 16)
    fails = {"forward": False}

    def check(module: nn.Module, args: Any) -> None:
        if fails["forward"]:
            raise ValueError("forward")

    handle = model[3].register_forward_pre_hook(check)
    store = fv.compress_activations(model, **settings)
    for _ in range(2):
        fails["forward"] = True
        with pytest.raises(ValueError, match="forward"), store:
            model(x)
        fails["forward"] = False
        assert not torch.overrides._get_current_function_mode_stack()
        with pytest.raises(ValueError, match="backward"), store:
            _refusing(model, x).backward()
        with store:
            loss = _refusing(model, x)
        with pytest.raises(ValueError, match="backward"):
            loss.backward()
        model.zero_grad()
        assert not hooks(model)
        with store:
            model(x).sum().backward()
        assert len(gradients(model)) == 8
    handle.remove()
    assert not hooks(model)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert store.steps == 2


def _refuse(_: Tensor) -> Tensor:
    raise ValueError("backward")


def _refusing(model: nn.Module, x: Tensor) -> Tensor:
    hidden = model[:3](x)
    hidden.register_hook(_refuse)
    loss: Tensor = model[3:](hidden).sum()
    return loss


def test_two_stores_of_two_models() -> None:
    one, other, x = small_model(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(8, 16)

    def run() -> list[Tensor]:
        made = one(x)
        other(made.detach()).square().mean().backward()
        first = gradients(other)
        other(made).square().mean().backward()
        return first + gradients(one) + gradients(other)

    wanted = run()
    with exact(one), exact(other):
        assert equal(wanted, run())
    with fv.compress_activations(one, levels=8, options=fv.ActivationOptions(smallest=1)) as outer:
        with fv.compress_activations(other, levels=8, options=fv.ActivationOptions(smallest=1)):
            found = run()
        assert hooks(other) == 2  # the outer store's own
        one(x).sum().backward()
    for w, f in zip(wanted, found, strict=True):
        assert (w - f).norm() < 0.2 * w.norm() + 1e-4
    assert outer.steps
    assert not hooks(one)


def test_entering_twice_is_refused_and_again_later_is_not() -> None:
    model, x = small_model(), torch.randn(8, 16)
    store = exact(model)
    with store, pytest.raises(RuntimeError, match="entered already"):
        store.__enter__()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), pytest.raises(RuntimeError, match="not here"):
        store.__enter__()
    assert not hooks(model)
    with store:
        model(x).sum().backward()
    assert store.steps == 1


def test_threads() -> None:
    model, x = small_model(), torch.randn(8, 16)
    model(x).square().mean().backward()
    wanted = gradients(model)
    twin = copy.deepcopy(model)
    store, errors = exact(model), []
    started, finished = threading.Barrier(2), threading.Barrier(2)

    def other() -> None:
        try:
            with pytest.raises(RuntimeError, match="entered already"):
                store.__enter__()
            started.wait(20)
            with exact(model), torch.no_grad():
                for _ in range(30):
                    model(x)  # its modules come and go beside ours
            with exact(twin):
                twin(x).square().mean().backward()
            finished.wait(20)
        except BaseException as error:
            errors.append(error)
            raise

    with store:
        thread = threading.Thread(target=other)
        thread.start()
        started.wait(20)
        for _ in range(30):
            model.zero_grad()
            model(x).square().mean().backward()
        finished.wait(20)
        thread.join()
    assert not errors
    assert equal(wanted, gradients(model))
    assert equal(wanted, gradients(twin))
    assert store.latest is not None
    assert any(name.startswith("3:saved.linear") for name in store.latest.sites)


# --- nothing is held for longer than the graph


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_memory_is_freed_without_the_collector(used: bool, exact: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
    payloads: list[weakref.ref[Any]] = []
    settings: dict[str, Any] = {"levels": 32} if exact else {"error": 0.1}
    with fv.compress_activations(model, **settings, options=fv.ActivationOptions(smallest=1)) as store:
        put = store._index.put

        def noted(tensor: Tensor, interval: Interval, item: Any) -> None:
            payloads.append(weakref.ref(item))
            put(tensor, interval, item)

        store._index.put = noted  # type: ignore[method-assign]
        for _ in range(4):
            loss = model(torch.randn(16, 64)).square().mean()
            assert sum(p() is not None for p in payloads) > 3
            if used:
                loss.backward()
            del loss
            assert not any(p() is not None for p in payloads)
        assert store._index.empty
        assert not store._recipes._by_storage


@pytest.mark.usefixtures("_no_collector")
def test_graphs_dropped_without_backward_do_not_pile_up() -> None:
    model = small_model()
    with fv.compress_activations(model, error=0.1, options=fv.ActivationOptions(smallest=1)) as store:
        for _ in range(5):
            model(torch.randn(8, 16)).sum()
        assert store._step is not None
        assert len(store._step.records) < 12
        model(torch.randn(8, 16)).sum().backward()
    assert store.steps == 1
