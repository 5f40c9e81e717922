"""Fused groups in compiled graphs: one call a group, made once, and no recompilation when levels are switched."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from attention import X
from torch import Tensor, nn

import foveate as fv
from tiny import generator, quantized_llama


class Graphs:
    """A backend for torch.compile that keeps the graphs it was given."""

    def __init__(self) -> None:
        self.made: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.made.append(graph)
        return graph

    def products(self) -> list[int]:
        """How many products each graph has, of those that have any: the hooks of a model can be graphs of their own."""
        counts = (sum("plane_linear" in str(node.target) for node in graph.graph.nodes) for graph in self.made)
        return [count for count in counts if count]


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_graph_has_one_call_a_group_and_is_made_once(model: nn.Module, mode: Any) -> None:
    expected, moved = model(X), model(X + 1)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with mode():
        x = X.clone()
        for _ in range(2):  # the very same tensor again
            assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(X + 1), moved)
        assert torch.equal(model(x), expected)
    assert graphs.products() == [2]


def test_a_graph_may_break_within_a_group(model: Any) -> None:
    def broken(x: Tensor) -> Tensor:
        q = model.q_proj(x)
        torch._dynamo.graph_break()
        return q[:, :16] * model.k_proj(x) + model.v_proj(x)

    expected = [broken(X), broken(X + 1)]
    for called in (broken, model):
        graphs = Graphs()
        model.forward = broken
        compiled = torch.compile(called, backend=graphs)
        for _ in range(2):
            assert [torch.equal(compiled(x), y) for x, y in zip((X, X + 1), expected, strict=True)] == [True, True]
    assert sum(graphs.products()) == 1


def test_what_one_graph_leaves_is_not_taken_by_another(model: Any) -> None:
    first = torch.compile(lambda x: model.q_proj(x) + 0, backend="eager")
    second = torch.compile(lambda x: model.k_proj(x) + 0, backend="eager")
    x = X.clone()
    with torch.no_grad():
        first(x)
        x += 1
        assert torch.equal(second(x), model.k_proj(X + 1))


def test_a_graph_of_some_layers_of_a_group_is_right(model: Any) -> None:
    compiled = torch.compile(lambda x: model.q_proj(x).sum() + model.k_proj(x).sum(), backend="eager", fullgraph=True)
    for x in (X, X + 1, X):
        assert torch.equal(compiled(x), model.q_proj(x.clone()).sum() + model.k_proj(x.clone()).sum())
    assert torch.equal(model.v_proj(X), model.v_proj(X.clone()))


def test_single_compiled_layers_of_a_group_see_a_switch(model: Any) -> None:
    x = X.clone()
    q, k = (torch.compile(layer, backend="eager") for layer in (model.q_proj, model.k_proj))
    with torch.no_grad():
        q(x)
        fv.apply(model, fv.current_map(model).with_level("*:weight", 2))
        assert torch.equal(k(x), model.k_proj(X.clone()))


def test_gradients_of_a_compiled_model(model: nn.Module) -> None:
    x, alone = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    model(alone).square().sum().backward()
    assert torch.equal(x.grad, alone.grad)  # type: ignore[arg-type]


def test_a_model_can_be_exported(model: nn.Module) -> None:
    x = X.clone()
    exported = torch.export.export(model, (x,))
    fv.apply(model, fv.current_map(model).with_level("*:weight", 4))
    assert torch.equal(exported.module()(X + 1), model(X + 1))


def test_a_llama_compiles_whole_and_a_switch_does_not_recompile() -> None:
    llama, profile = quantized_llama()
    fv.unfuse(llama)  # compiled calls run layer by layer
    ids = torch.randint(0, 50, (2, 7), generator=generator(3))
    compiled = torch.compile(llama.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for level in (8, 2, 4):
                plan = profile.uniform(level).with_level("*.k_proj:input", 32 // level)  # another than q's and v's
                fv.apply(llama, plan)
                got = compiled(input_ids=ids, use_cache=False).logits
                assert torch.equal(got, llama(input_ids=ids, use_cache=False).logits)


def _generated(model: Any, **options: Any) -> Tensor:
    ids = torch.randint(0, 50, (1, 5), generator=generator(3))
    tokens: Tensor = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static", **options)
    return tokens


def test_generate_with_a_compiled_model_and_a_static_cache() -> None:
    llama, _ = quantized_llama()
    expected = _generated(llama)
    llama.forward = torch.compile(llama.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(_generated(llama), expected)


def test_generate_compiles_as_documented_and_runs_on_one_pool_of_threads() -> None:
    from transformers import CompileConfig

    llama, profile = quantized_llama(num_hidden_layers=1)
    fv.apply(llama, profile.uniform(4))
    expected = [_generated(llama)]
    compiled = CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True
    with torch.inference_mode():
        assert torch.equal(_generated(llama, compile_config=compiled), expected[0])
        fv.apply(llama, profile.uniform(2))
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = _generated(llama, compile_config=compiled)
    assert torch.equal(got, _generated(llama))
    if sys.platform == "linux":
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        # what other libraries bring for themselves (scikit-learn does) lies in folders of their own
        pools = {path for path in mapped if re.search(r"lib(gomp|iomp|omp)[^/]*\.so", path)}
        assert len({path for path in pools if "/torch/" in path or "site-packages" not in path}) == 1


def test_decoding_keeps_no_more_tensors_and_no_more_memory() -> None:
    llama, _ = quantized_llama()
    ids = torch.randint(0, 50, (1, 5), generator=generator(3))

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts, resident_bytes = [], []
    with torch.no_grad():
        for _ in range(6):
            llama.generate(ids, max_new_tokens=50, do_sample=False, cache_implementation="static", eos_token_id=None)
            counts.append(alive())
            resident_bytes.append(psutil.Process().memory_info().rss)
    assert len(set(counts[1:])) == 1
    assert resident_bytes[-1] - resident_bytes[2] < 1 << 20  # 150 tokens of 14 products each
