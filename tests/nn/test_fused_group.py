"""Layers with one input share a call, and give the same results as separate calls."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from attention import Attention, Counted, X, apart, within
from torch import Tensor, nn

import foveate as fv
from foveate.nn import fused_group as fused_group
from foveate.nn.registry import registry_of
from tiny import generator, quantized_llama


def test_one_call_gives_what_three_give(model: nn.Module) -> None:
    with Counted() as together:
        got = model(X)
    separate = apart(model)
    with Counted() as alone:
        expected = separate(X)
    assert torch.equal(got, expected)
    assert (together.products(), alone.products()) == (2, 4)


def test_input_levels_within_a_group_may_differ(model: nn.Module) -> None:
    plan = fv.current_map(model).with_level("k_proj:input", 16).with_level("v_proj:input", 32)
    fv.apply(model, plan)
    got = model(X)
    assert torch.equal(got, apart(model)(X))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_level_that_changes_between_two_layers_is_read_from_the_next_pass_on(model: Any, mode: Any) -> None:
    with mode():
        low = fv.current_map(model).with_level("*:weight", 2)
        before = model.v_proj(X)

        def switched(x: Tensor) -> tuple[Tensor, Tensor]:
            q = model.q_proj(x)
            fv.apply(model, low)
            return q, model.v_proj(x)

        q, got = within(model, switched, X)
        assert torch.equal(got, before)
        assert not torch.equal(got, model.v_proj(X))
        assert not torch.equal(q, model.q_proj(X))


def test_an_input_that_is_written_to_between_two_layers_is_seen(model: Any) -> None:
    def written(x: Tensor) -> Tensor:
        model.q_proj(x)
        x += 1
        return model.k_proj(x)

    assert torch.equal(within(model, written, X.clone()), model.k_proj(X + 1))


CHANGES = {
    "data": lambda x: x.data.add_(1),
    "numpy": lambda x: x.numpy().__iadd__(1),
    "other data": lambda x: setattr(x, "data", X + 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("calls", ["alone", "in two calls"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_that_is_not_counted_is_seen_after_the_call(model: Any, change: str, calls: str, mode: Any) -> None:
    with mode():
        x = X.clone()
        if calls == "alone":
            model.q_proj(x)
        else:
            within(model, model.q_proj, x)
        CHANGES[change](x)
        expected = apart(copy.deepcopy(model))(X + 1)
        assert torch.equal(model.k_proj(x), model.k_proj(X + 1))
        assert torch.equal(model(x), expected)


def test_a_call_that_raises_drops_pending_results(model: Any) -> None:
    pending = []

    def failing(x: Tensor) -> None:
        model.q_proj(x)
        pending.append(weakref.ref(fused_group._CALLS.open[-1].pending[model.q_proj.fused_group].results[1]))
        raise ValueError("stop")

    x = X.clone()
    with pytest.raises(ValueError, match="stop"):
        within(model, failing, x)
    assert not fused_group._CALLS.open
    assert pending[0]() is None
    x.data.add_(1)
    assert torch.equal(model.k_proj(x), model.k_proj(X + 1))


def test_an_interruption_is_cleared_up_by_the_next_pass(model: Any) -> None:
    def interrupted(x: Tensor) -> None:
        model.q_proj(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within(model, interrupted, X.clone())
    assert fused_group._CALLS.open  # torch runs no hooks then
    model(X)
    assert not fused_group._CALLS.open


def test_a_call_within_a_call_has_results_of_its_own(model: Any) -> None:
    alone = apart(copy.deepcopy(model))

    def twice(x: Tensor) -> Tensor:
        q = model.q_proj(x)
        if torch.equal(x, X):
            x.data.add_(1)  # the inner call has the same tensor, and none of the outer call's results
            return model(x) + q.sum()
        return model.k_proj(x)

    with Counted() as counted:
        got = within(model, twice, X.clone())
    assert torch.equal(got, alone.k_proj(X + 1) + alone.q_proj(X).sum())
    assert counted.products() == 2


def test_in_inference_mode_a_group_is_one_call(model: nn.Module) -> None:
    expected = apart(copy.deepcopy(model))(X)
    with torch.inference_mode(), Counted() as counted:
        assert torch.equal(model(X.clone()), expected)  # the clone is a tensor of inference mode
    assert counted.products() == 2


def test_every_order_and_every_part_is_right(model: Any) -> None:
    alone = {name: getattr(model, name)(X.clone()) for name in ("q_proj", "k_proj", "v_proj")}
    for names in (("v_proj", "q_proj"), ("k_proj", "k_proj"), ("q_proj", "v_proj", "k_proj", "q_proj"), ("v_proj",)):
        x = X.clone()
        assert all(torch.equal(getattr(model, name)(x), alone[name]) for name in names)

        def all_of_them(x: Tensor, names: tuple[str, ...] = names) -> list[Tensor]:
            return [getattr(model, name)(x) for name in names]

        for name, y in zip(names, within(model, all_of_them, x), strict=True):
            assert torch.equal(y, alone[name])


def test_a_group_with_two_inputs_is_dissolved(model: nn.Module) -> None:
    other = torch.randn(5, 64, generator=generator(1))
    expected = copy.deepcopy(model)
    apart(expected)
    for _ in range(6):
        assert torch.equal(model(X.clone(), other.clone()), expected(X, other))
    with Counted() as counted:
        model(X, other)
    assert counted.products() == 4
    assert torch.equal(model(X), expected(X))


def test_a_group_of_which_some_layers_are_not_used_is_dissolved(model: Any) -> None:
    y = model.q_proj(X.clone())
    assert model.q_proj.fused_group._unused == 0  # outside of a call only the own product is computed
    for _ in range(6):
        assert torch.equal(within(model, model.q_proj, X.clone()), y)
    assert not model.q_proj.fused_group.is_fused


def test_a_group_that_is_used_stays_fused(model: nn.Module) -> None:
    for _ in range(20):
        model(X)
    model.q_proj(X)
    with Counted() as counted:
        model(X.clone())
    assert counted.products() == 2


def test_cross_attention_is_known_by_its_name() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder_attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder_attn(x, x + 1)

    layer = Layer()
    fv.quantize(layer, [X], progress=False)
    assert layer.encoder_attn.q_proj.fused_group is None


def test_gradients_are_those_of_separate_layers(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    alone = X.clone().requires_grad_()
    apart(model)(alone).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, alone.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_form_groups_of_their_own(model: Any, copied: Any) -> None:
    before = model(X)
    other = copied(model)
    assert other.q_proj.fused_group is other.v_proj.fused_group is not model.q_proj.fused_group
    fv.apply(other, fv.current_map(other).with_level("*:weight", 2))
    with Counted() as counted:
        assert not torch.equal(other(X), before)
    assert counted.products() == 2
    assert torch.equal(model(X), before)


def test_a_copy_of_one_layer_has_no_group(model: Any) -> None:
    layer = copy.deepcopy(model.q_proj)
    assert layer.fused_group is None
    assert torch.equal(layer(X), model.q_proj(X))


def test_nothing_is_kept_when_the_call_is_over(model: Any) -> None:
    kept = []

    def part(x: Tensor) -> Tensor:
        y = model.k_proj(x)
        pending = fused_group._CALLS.open[-1].pending[model.k_proj.fused_group]
        kept.extend(weakref.ref(t) for t in (pending.results[0], pending.x))
        return y

    within(model, part, X.clone())
    assert [reference() for reference in kept] == [None, None]


def test_nothing_is_left_on_the_input(model: nn.Module) -> None:
    x = X.clone()
    model(x)
    assert not x.__dict__
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), x)


def test_planes_are_freed_with_the_model() -> None:
    made = Attention()
    fv.quantize(made, [X], progress=False)
    made(X)
    plane = weakref.ref(made.q_proj.weight.plane0)  # type: ignore[union-attr]
    gc.collect()
    gc.disable()
    try:
        del made
        assert plane() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hooks_of_layers_in_a_group_do_what_they_did(model: Any, mode: Any) -> None:
    seen = []

    def change(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].add_(1)

    model.k_proj.register_forward_pre_hook(change)
    model.v_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model.q_proj.register_forward_hook(lambda *_: seen.append("q"))
    with mode():
        got = model(X.clone())
        assert torch.equal(got, apart(model)(X.clone()))
    assert seen == ["q", "q"]


def test_a_hook_that_raises_leaves_nothing_behind(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("stop")

    expected = model(X.clone())
    x = X.clone()
    hook = model.v_proj.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        model(x)
    hook.remove()
    x += 1
    assert torch.equal(model(x), model(x.clone()))
    assert torch.equal(model(X), expected)


def test_threads_do_not_meet(model: nn.Module) -> None:
    inputs = [torch.randn(3, 64, generator=generator(i)) for i in range(4)]
    expected = [model(x) for x in inputs]
    wrong = []

    def run(i: int) -> None:
        for _ in range(30):
            if not torch.equal(model(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_in_inference_mode_a_change_in_place_between_calls_is_seen(model: Any) -> None:
    with torch.inference_mode():
        x = X.clone()
        model.q_proj(x)
        x.add_(1)
        assert torch.equal(model.k_proj(x), model.k_proj(X + 1))

    def left(x: Tensor) -> Tensor:
        with torch.inference_mode():
            model.q_proj(x)
        return model.k_proj(x)

    assert not within(model, left, X.clone()).is_inference()


def test_weights_whose_memory_moves_are_found_again(model: Any) -> None:
    expected = model(X.clone())
    for module in model.modules():
        for buffer in module.buffers(recurse=False):
            buffer.share_memory_()
    assert torch.equal(model(X.clone()), expected)


def test_a_token_takes_one_call_a_group() -> None:
    llama, _ = quantized_llama()
    fv.unfuse(llama)
    ids = torch.tensor([[3]])
    with torch.no_grad(), Counted() as counted:
        llama(input_ids=ids, use_cache=False)
    layers = llama.config.num_hidden_layers
    assert counted.products() == 4 * layers + 1
    assert len(registry_of(llama).inputs) == 7 * layers + 1
