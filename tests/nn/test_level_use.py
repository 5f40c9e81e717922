"""Generations of a live model: passes that read one whole, rows with maps of their own, and deciders that leave."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate as fv
from foveate.errors import BudgetError, DataError, FloorError, FoveateError
from foveate.kernels.backends.table import ensure_loaded
from foveate.nn.levels import set_index, withdraw
from foveate.nn.registry import registry_of
from foveate.precision.maps import PrecisionMap
from tiny import generator, mlp, quantized_llama, quantized_mlp, rows

X = torch.randn(4, 70, generator=generator(0))
LEVELS = (8, 6, 4, 3, 2)


def _chain(profile: fv.Profile) -> fv.Frontier:
    return fv.Frontier(tuple(profile.uniform(level, 8) for level in LEVELS))


def _outputs(model: nn.Module, maps: list[PrecisionMap], call: Callable[[], Tensor]) -> list[Tensor]:
    outputs = []
    for plan in maps:
        fv.apply(model, plan)
        outputs.append(call())
    return outputs


class Slow(nn.Module):
    """Layers between which another thread may run."""

    def __init__(self, gradient: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Sleepy(Slow):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            time.sleep(0)
        return x


@contextmanager
def _switching(model: nn.Module, maps: list[PrecisionMap]) -> Iterator[list[int]]:
    """Another thread switches the model among maps; the list counts how often."""
    stop, count = threading.Event(), [0]

    def switch() -> None:
        while not stop.is_set():
            fv.apply(model, maps[count[0] % len(maps)])
            count[0] += 1

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def _quantized(kind: type[nn.Module]) -> tuple[nn.Module, list[PrecisionMap]]:
    model = kind().eval()
    profile = fv.quantize(model, rows(64, 32), objective=fv.Embedding(), progress=False)
    return model, [profile.uniform(level, 8) for level in LEVELS]


@pytest.mark.parametrize("gradient", [False, True])
def test_no_pass_is_torn_by_switches_of_another_thread(gradient: bool) -> None:
    model, maps = _quantized(Sleepy)
    x = torch.randn(3, 32, generator=generator(1))

    def call() -> Tensor:
        with torch.set_grad_enabled(gradient):
            given = x.clone().requires_grad_(gradient)
            y = model(given)
            if not gradient:
                return y
            time.sleep(0)
            y.sum().backward()
            assert given.grad is not None
            return torch.cat([y.detach(), given.grad])

    whole = _outputs(model, maps, call)
    torn: list[Tensor] = []

    def run() -> None:
        torn.extend(y for y in (call() for _ in range(150)) if not any(torch.equal(y, one) for one in whole))

    with _switching(model, maps) as count:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert count[0] > 50
    assert not torn


def test_no_compiled_pass_is_torn() -> None:
    torch._dynamo.reset()
    model, maps = _quantized(Slow)
    x = torch.randn(3, 32, generator=generator(1))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        whole = _outputs(model, maps, lambda: compiled(x))
        with _switching(model, maps), torch._dynamo.config.patch(error_on_recompile=True):
            got = [compiled(x) for _ in range(200)]
    assert len({id(one) for y in got for one in whole if torch.equal(y, one)}) > 1
    assert all(any(torch.equal(y, one) for one in whole) for y in got)
    torch._dynamo.reset()


def test_a_change_is_seen_by_the_next_pass_whichever_thread_made_it() -> None:
    model, profile = quantized_mlp()
    expected = _outputs(model, [profile.uniform(level) for level in LEVELS], lambda: model(X))
    for level, y in zip(LEVELS, expected, strict=True):
        thread = threading.Thread(target=lambda level=level: fv.apply(model, profile.uniform(level)))
        thread.start()
        thread.join()
        assert torch.equal(model(X), y)


def test_a_layer_called_outside_of_any_pass_reads_the_newest() -> None:
    model, profile = quantized_mlp()
    fv.apply(model, profile.uniform(8, 8))
    first = model[0](X)
    fv.apply(model, profile.uniform(2, 8))
    assert not torch.equal(model[0](X), first)
    with pytest.raises(ZeroDivisionError):
        _interrupted(model)
    fv.apply(model, profile.uniform(8, 8))
    assert torch.equal(model[0](X), first)


def _interrupted(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    hook = model[2].register_forward_hook(fail)
    try:
        model(X)
    finally:
        hook.remove()


def test_the_index_moves_along_a_chain_and_withdraws() -> None:
    model, profile = quantized_mlp()
    chain = _chain(profile)
    outputs = _outputs(model, list(chain), lambda: model(X))
    fv.apply(model, chain)
    for index, y in enumerate(outputs):
        set_index(model, index, decider="runtime")
        assert torch.equal(model(X), y)
        assert fv.current_map(model) is chain[index]
    assert fv.state_of(model).indices == {"runtime": 4}
    with fv.floor(model, bits=chain.bits(2)):
        assert torch.equal(model(X), outputs[2])
        with fv.floor(model, index=1):
            assert torch.equal(model(X), outputs[1])
        with pytest.raises(FloorError, match="of 99 bits cannot be met"), fv.floor(model, bits=99):
            pass
        with pytest.raises(FloorError):
            fv.apply(model, profile.uniform(2), decider="importance")
        assert torch.equal(model(X), outputs[2])
    assert torch.equal(model(X), outputs[4])
    withdraw(model, "runtime")
    assert torch.equal(model(X), outputs[0])
    with pytest.raises(BudgetError, match=r"index \(=5\) is not on the frontier, 0..4"):
        set_index(model, 5)


def test_a_copy_of_a_model_has_generations_of_its_own() -> None:
    model, profile = quantized_mlp()
    fv.apply(model, _chain(profile))
    set_index(model, 3)
    other = copy.deepcopy(model)
    assert fv.state_of(other) == fv.state_of(model)
    assert torch.equal(other(X), model(X))
    before = model(X)
    set_index(other, 0)
    assert torch.equal(model(X), before)
    assert not torch.equal(other(X), before)


def test_a_decider_and_no_levels() -> None:
    with pytest.raises(FoveateError, match="is not quantized"):
        fv.state_of(mlp())


REQUESTS = [None, fv.Request(tier=0), fv.Request(floor=fv.Floor(index=2)), fv.Request(tier=3)]
READ = (4, 0, 2, 3)  # their indices while 4 is in force


def _rows_alone(model: nn.Module, chain: fv.Frontier, call: Callable[[int], Tensor]) -> list[Tensor]:
    alone = []
    for row, index in enumerate(READ):
        fv.apply(model, chain[index])
        alone.append(call(row))
    return alone


@pytest.mark.parametrize("gradient", [False, True])
def test_rows_of_a_batch_have_the_bits_that_they_have_alone(gradient: bool) -> None:
    model, profile = quantized_mlp()
    chain = _chain(profile)
    x = X.clone().requires_grad_(gradient)
    alone = _rows_alone(model, chain, lambda row: model(X[row : row + 1]))
    fv.apply(model, chain)
    set_index(model, 4)
    plain = model(X)
    with fv.row_precision(model, REQUESTS):
        y = model(x)
        assert torch.equal(y.detach(), torch.cat(alone).detach())
        if gradient:
            y.sum().backward()
        with pytest.raises(DataError, match="precision was asked for 4 rows, and the model is given 3"):
            model(X[:3])
    assert torch.equal(model(X), plain)
    assert fv.state_of(model).requests == {}
    if gradient:
        assert x.grad is not None
        for row, index in enumerate(READ):
            fv.apply(model, chain[index])
            single = X[row : row + 1].clone().requires_grad_()
            model(single).sum().backward()
            assert single.grad is not None
            assert torch.allclose(x.grad[row : row + 1], single.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_a_decoder(tied: bool) -> None:
    model, profile = quantized_llama(tie_word_embeddings=tied)
    chain = _chain(profile)
    ids = torch.randint(0, model.config.vocab_size, (4, 7), generator=generator(3))
    products = _recorded(model)
    with torch.no_grad():
        alone = [dict(_run(model, products, ids[row : row + 1], chain[index])) for row, index in enumerate(READ)]
        fv.apply(model, chain)
        set_index(model, 4)
        with fv.row_precision(model, REQUESTS):
            together = _run(model, products, ids)
    for name, (given, got) in together.items():
        for row in range(4):
            # attention is not the same in every batch: a layer is compared where its input is the same
            if torch.equal(given[row], alone[row][name][0][0]):
                assert torch.equal(got[row], alone[row][name][1][0]), (name, row)
    first = [name for name in together if "layers.0.self_attn.q_proj" in name or "embed" in name]
    assert all(torch.equal(together[n][0][row], alone[row][n][0][0]) for n in first for row in range(4))


def _recorded(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes in and out of every module on planes in the last call."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "input_place"):

            def record(_: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                seen[name] = (args[0], output)

            module.register_forward_hook(record)
    return seen


def _run(
    model: Any, seen: dict[str, tuple[Tensor, Tensor]], ids: Tensor, plan: PrecisionMap | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    seen.clear()
    if plan is not None:
        fv.apply(model, plan)
    model(input_ids=ids, use_cache=False)
    return dict(seen)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.depthwise(torch.relu(self.dense(x)))).mean((2, 3)))


def test_rows_of_a_convolutional_network() -> None:
    model = _Convolutions().eval()
    images = torch.randn(4, 3, 8, 8, generator=generator(5))
    profile = fv.quantize(model, [images], objective=fv.Logits(), progress=False)
    chain = _chain(profile)
    with torch.no_grad():
        alone = _rows_alone(model, chain, lambda row: model(images[row : row + 1]))
        fv.apply(model, chain)
        set_index(model, 4)
        with fv.row_precision(model, REQUESTS):
            together = model(images)
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together, model(images), rtol=1e-3, atol=1e-4)


def test_rows_that_cannot_be_attributed_read_the_best_in_use() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rows, self.all = nn.Linear(70, 20), nn.Linear(70, 20)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.rows(x), self.all(x.mean(0, keepdim=True).repeat(3, 1))

    model = Pooled()
    profile = fv.quantize(model, rows(64, 70), objective=fv.Embedding(), loss=_size, progress=False)
    chain = _chain(profile)
    fv.apply(model, chain[2])
    best = model(X)[1]
    fv.apply(model, chain)
    set_index(model, 4)
    with fv.row_precision(model, [None, fv.Request(tier=2), None, fv.Request(tier=3)]):
        assert torch.equal(model(X)[1], best)


def _size(output: Any, batch: Any) -> Tensor:
    total: Tensor = output[0].square().sum() + output[1].square().sum()
    return total


def test_requests_that_are_refused() -> None:
    model, _ = quantized_mlp()
    with pytest.raises(BudgetError, match="no requests are given"), fv.row_precision(model, []):
        pass
    with pytest.raises(FloorError), fv.row_precision(model, [fv.Request(floor=fv.Floor(bits=99))]):
        pass
    assert fv.state_of(model).requests == {}


@pytest.mark.skipif(ensure_loaded().isa is None, reason="no compiled kernels")
def test_memory_of_generations_is_freed() -> None:
    model, profile = quantized_mlp()
    registry = registry_of(model)
    first = torch.ops.foveate.pass_levels(registry.generations.book, 0, *model[0].weight.value.grid)
    kept = first.clone()
    for level in LEVELS * 20:
        fv.apply(model, profile.uniform(level))
    assert torch.equal(first[0], kept[0])  # what a pass, or a tensor, still needs is as it was
    assert registry.generations.number > 100


def test_rows_keep_their_precision_while_other_threads_come_and_go() -> None:
    model, profile = quantized_mlp()
    fv.apply(model, fv.frontier(profile, 6))
    x = torch.randn(5, 70, generator=generator(2))
    with torch.no_grad():
        with fv.row_precision(model, [fv.Request(tier=4)] * 5):
            expected = model(x)
        assert not torch.equal(model(x), expected)
        entered, left = threading.Event(), threading.Event()

        def other() -> None:
            with fv.row_precision(model, [fv.Request(tier=2)]):
                entered.set()
                assert left.wait(60)

        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(60)
        with fv.row_precision(model, [fv.Request(tier=4)] * 5):
            assert torch.equal(model(x), expected)
            left.set()
            thread.join()  # whose class was the first: the others' numbers change
            assert torch.equal(model(x), expected)
            with fv.row_precision(model, [fv.Request(tier=1)] * 5):
                assert not torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
        assert not torch.equal(model(x), expected)
