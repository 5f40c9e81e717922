"""Attention computed again from rounded arguments: gradients are the exact ones at those arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveate as fv
from foveate.activations.recompute.attention import AttentionCall, AttentionRecomputation
from foveate.activations.store import ActivationStore

_LEVELS = {"*:saved.scaled_dot_product_attention*": 2, "*": 32}


class Attention(nn.Module):
    """Queries, keys and values by one layer, attention, and a layer after it; large logits."""

    def __init__(self, heads: int, groups: int, width: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.groups, self.width, self.options = heads, groups, width, dict(options)
        self.qkv = nn.Linear(24, (heads + 2 * groups) * width)
        self.out = nn.Linear(heads * width, 5)
        nn.init.normal_(self.qkv.weight, std=0.6)
        self.arguments: tuple[Tensor, ...] = ()
        self.y: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        sizes = [n * self.width for n in (self.heads, self.groups, self.groups)]
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in self.qkv(x).split(sizes, -1))
        self.arguments, self.y = (q, k, v), F.scaled_dot_product_attention(q, k, v, **self.options)
        for tensor in (*self.arguments, self.y):
            tensor.retain_grad()
        result: Tensor = self.out(self.y.transpose(1, 2).flatten(2))
        return result


def _masks() -> dict[str, dict[str, Any]]:
    queries = 37
    allowed = torch.rand(2, 1, queries, queries) < 0.7
    allowed |= torch.eye(queries, dtype=torch.bool)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "scaled": {"scale": 0.3},
        "allowed": {"attn_mask": allowed},
        "added": {"attn_mask": torch.randn(queries, queries)},
    }


def _gradients(model: Attention, x: Tensor, *, error: float, recompute: bool) -> ActivationStore:
    options = fv.ActivationOptions(smallest=1, recompute=recompute)
    store = fv.compress_activations(model, error=error, options=options)
    with store:
        model(x).square().sum().backward()
    return store


@pytest.mark.parametrize("kind", _masks())
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_attention_at_the_rounded_arguments(kind: str, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    options = _masks()[kind] | ({"enable_gqa": True} if groups == 2 else {})
    if dtype == torch.bfloat16 and kind == "added":
        options["attn_mask"] = options["attn_mask"].to(dtype)
    model = Attention(4, groups, 11, options).to(dtype)
    x = torch.randn(2, 37, 24, dtype=dtype)
    with fv.compress_activations(model, levels=_LEVELS, options=fv.ActivationOptions(smallest=1)) as store:
        loss = model(x).square().sum()
        node: Any = model.y.grad_fn if model.y is not None else None
        rounded = [
            saved.detach().clone().requires_grad_() for saved in (node._saved_query, node._saved_key, node._saved_value)
        ]
        loss.backward()
    assert store.latest is not None
    assert [k.held for k in store.latest.sites.values() if k.form == "recomputed"] == [0, 0], store.latest.sites
    assert model.y is not None
    assert model.y.grad is not None
    F.scaled_dot_product_attention(*rounded, **options).backward(model.y.grad)
    for argument, at in zip(model.arguments, rounded, strict=True):
        assert argument.grad is not None
        assert at.grad is not None
        assert not torch.equal(argument, at)
        assert torch.allclose(argument.grad, at.grad, rtol=1e-4, atol=1e-5 * float(at.grad.abs().max()))


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    torch.manual_seed(7)
    model = Attention(2, 2, 16, {"is_causal": True})
    with fv.compress_activations(model, levels=_LEVELS, options=fv.ActivationOptions(smallest=1)):
        loss = model(torch.randn(2, 50, 24)).square().sum()
        first = torch.autograd.grad(loss, model.qkv.weight, retain_graph=True)[0]
        second = torch.autograd.grad(loss, model.qkv.weight)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("disturb", ["dropout", "another kernel", "off"])
def test_what_cannot_be_run_again_is_kept(disturb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    if disturb == "another kernel":
        run: Callable[[AttentionCall, list[Tensor]], tuple[Tensor, Tensor]] = AttentionCall.run

        def other(self: AttentionCall, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
            output, sums = run(self, inputs)
            return output * (1 + 1e-3), sums * (1 + 1e-3)

        monkeypatch.setattr(AttentionCall, "run", other)
    model = Attention(2, 2, 16, {"dropout_p": 0.1} if disturb == "dropout" else {})
    store = _gradients(model, torch.randn(2, 50, 24), error=0.3, recompute=disturb != "off")
    assert store.latest is not None
    assert "recomputed" not in {kept.form for kept in store.latest.sites.values()}
    sites = store.planner.ledger.sites
    arguments = [s for s in sites.values() if re.search(r"saved.scaled_dot_product_attention.0.[012]$", s.name)]
    assert arguments
    floor = 2 if disturb == "dropout" else 4  # which keeps probabilities
    assert {site.rule.floor for site in arguments} == {floor}


def test_two_bits_are_on_offer_where_it_is_run_again() -> None:
    torch.manual_seed(9)
    model = Attention(2, 2, 16, {"is_causal": True})
    with fv.compress_activations(model, error=0.4, options=fv.ActivationOptions(smallest=1, audit_every=1)) as store:
        for _ in range(12):
            model(torch.randn(2, 50, 24)).square().sum().backward()
    sites = [s for s in store.planner.ledger.stored_sites() if ":saved.scaled_dot_product_attention.0" in s.name]
    assert len(sites) == 3
    assert all(0 < store.planner.ledger.errors(site)[0] < torch.inf for site in sites)
    assert sum(audited <= 0.4 for _, _, audited in store.audits) >= 0.9 * len(store.audits)


def test_only_attention_on_cpus_is_looked_at() -> None:
    found: list[Tensor] = []
    attention = AttentionRecomputation(lambda source: found[0])
    model = nn.Linear(4, 4)
    with fv.compress_activations(model, levels=2, options=fv.ActivationOptions(smallest=1)) as store:
        store._attention = attention
        model(torch.randn(3, 4)).sum().backward()
    assert attention._agrees == {}
