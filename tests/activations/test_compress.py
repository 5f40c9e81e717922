"""Training with compressed activations: exact where it says so, and within the stated error where it does not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveate as fv
from benchmarks.models.resnet import ResNet


class Gated(nn.Module):
    """Norms, a gate, attention and a loss, at widths that do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.norm = nn.LayerNorm(40)
        self.qkv = nn.Linear(40, 120)
        self.gate, self.up, self.down = nn.Linear(40, 72), nn.Linear(40, 72), nn.Linear(72, 40)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(40, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (4, 10)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.drop(self.down(F.silu(self.gate(x)) * self.up(x)))
        logits: Tensor = self.head(F.gelu(x))
        return logits


def _text() -> tuple[nn.Module, list[Tensor], Tensor]:
    ids = torch.randint(0, 50, (6, 33))
    return Gated(), [ids[:, :-1]], ids[:, 1:].flatten()


def _images() -> tuple[nn.Module, list[Tensor], Tensor]:
    return ResNet(8), [torch.randn(6, 3, 32, 32)], torch.randint(0, 10, (6,))


def _loss(model: nn.Module, inputs: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(model(*inputs).flatten(0, -2), labels)


@pytest.mark.parametrize("make", [_text, _images])
def test_level_32_gives_the_gradients_of_plain_training(make: object) -> None:
    model, inputs, labels = make()  # type: ignore[operator]
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    _loss(twin, inputs, labels).backward()
    torch.manual_seed(1)
    with fv.compress_activations(model, levels=32, options=fv.ActivationOptions(smallest=1)) as store:
        _loss(model, inputs, labels).backward()
    after = torch.get_rng_state()
    for wanted, found in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(wanted.grad, found.grad)  # type: ignore[arg-type]
    assert store.latest is not None
    assert store.latest.held < store.latest.original
    torch.manual_seed(1)
    _loss(twin, inputs, labels)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("relative_to", fv.Relative)
@pytest.mark.parametrize("make", [_text, _images])
def test_audits_stay_under_the_stated_error(make: object, relative_to: fv.Relative) -> None:
    torch.manual_seed(3)
    model, _, _ = make()  # type: ignore[operator]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with fv.compress_activations(
        model,
        error=0.2,
        relative_to=relative_to,
        options=fv.ActivationOptions(audit_every=2, profile_every=5, smallest=64),
    ) as store:
        for _ in range(24):
            _, inputs, labels = make()  # type: ignore[operator]
            _loss(model, inputs, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    audited = [error for _, _, error in store.audits]
    assert len(audited) >= 8
    assert max(audited) < 0.2
    assert sum(audited[-4:]) / 4 > 0.2 / 4  # not wasteful either
    assert store.latest is not None
    assert store.latest.original > 5 * store.latest.held


class Pooled(nn.Module):
    """A layer whose output nothing uses, as encoders have one for classification."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.body(x))
        torch.tanh(self.pooler(x.square()))
        return x


def test_what_the_loss_does_not_depend_on_has_no_error() -> None:
    torch.manual_seed(0)
    model = Pooled()
    with fv.compress_activations(
        model, error=0.2, options=fv.ActivationOptions(audit_every=2, profile_every=2)
    ) as store:
        for _ in range(12):
            model(torch.randn(64, 64)).square().mean().backward()
    predicted = [predicted for _, predicted, _ in store.audits]
    assert predicted
    assert all(0 < predicted < 0.2 for predicted in predicted)
    assert len(predicted) < 12
    assert store.latest is not None
    idle = {name: kept.level for name, kept in store.latest.sites.items() if "tanh" in name or "pooler" in name}
    assert idle
    assert set(idle.values()) <= {0, 2}


def test_audits_are_closer_together_at_first_and_measure_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    seen: dict[int, tuple[bool, bool]] = {}
    with fv.compress_activations(
        model, error=0.2, options=fv.ActivationOptions(audit_every=30, profile_every=1000)
    ) as store:
        for number in range(40):
            model(torch.randn(32, 64)).square().mean().backward()
            assert store.latest is not None
            seen[number] = store.latest.profiled, store.latest.audited
    learnt = next(number for number, (_, audited) in seen.items() if audited) + 4
    assert [number for number, (_, audited) in seen.items() if audited and number >= learnt] == [8, 16, 30, 32]
    assert all(profiled for profiled, audited in seen.values() if audited)


def test_another_models_tensors_are_left_alone() -> None:
    torch.manual_seed(0)
    own, other = (nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 40)) for _ in range(2))
    x = torch.randn(64, 40)

    def gradients(*given: nn.Module) -> list[Tensor]:
        (own(x).mean() + other(x).mean()).backward()
        found = [p.grad.clone() for model in given for p in model.parameters() if p.grad is not None]
        own.zero_grad()
        other.zero_grad()
        return found

    exact = gradients(other)
    with fv.compress_activations(own, levels=2, options=fv.ActivationOptions(smallest=1)) as store:
        assert all(torch.equal(a, b) for a, b in zip(exact, gradients(other), strict=True))
    assert not [row for row in store.report().rows if row.layer == "foreign"]
    assert "error of each parameter's gradient not measured" in str(store.report())


def test_a_part_of_a_large_tensor_counts_for_what_it_is() -> None:
    model, data = nn.Linear(40, 8), torch.randn(100, 64, 40)
    with fv.compress_activations(model, levels=8, options=fv.ActivationOptions(smallest=1)) as store:
        model(data[3]).sum().backward()
    assert store.report().bytes_before == 64 * 40 * 4


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_budget_in_bytes_counts_where_each_step_is_entered(accumulated: int) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    store = fv.compress_activations(model, bytes="4KiB")
    with pytest.raises(fv.BudgetError, match="the least possible is"):  # noqa: PT012
        for _ in range(8):
            with store:
                for _ in range(accumulated):
                    model(torch.randn(256, 64)).square().mean().backward()
            model.zero_grad()


def test_what_only_a_second_backward_reads_is_not_taken_for_idle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(512, 64)

    def run() -> Tensor:
        model.zero_grad()
        first, second = model(x).square().mean(), model(2 * x).square().mean()
        first.backward()
        second.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wanted = run()
    with fv.compress_activations(model, error=0.05) as store:
        errors = [float((run() - wanted).norm() / wanted.norm()) for _ in range(12)]
    assert max(errors) < 0.05
    assert len(store.audits) < 12
    assert store.latest is not None
    assert store.latest.sites["outside:saved.square.1.0"].level == 8


def test_sites_of_a_forward_without_backward_do_not_keep_it_from_learning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    with fv.compress_activations(model, error=0.1) as store:
        torch.tanh(model(torch.randn(64, 64))).exp()  # of a validation, say
        for _ in range(24):
            model(torch.randn(64, 64)).square().mean().backward()
    assert not any("tanh" in name or "exp" in name for name in store.planner.ledger.sites)
    assert 4 <= len(store.audits) < 12


def test_where_nothing_can_be_probed_not_every_step_is_profiled() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
    x = torch.randn(64, 64, requires_grad=True)
    seen: list[bool] = []

    def train() -> None:
        with fv.compress_activations(model, error=0.1) as store:
            for _ in range(20):
                model(x).square().mean().backward()
                assert store.latest is not None
                seen.append(store.latest.profiled)

    with pytest.warns(RuntimeWarning, match="cannot be probed"):
        train()
    assert sum(seen) < 10


class _RootMeanSquare(nn.Module):
    """A norm made of parts, as transformers' Llama has it, and a gate of one value a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.gate = nn.Embedding(50, 64), nn.Linear(64, 50), nn.Linear(64, 1)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * torch.logspace(-2, 1, 50)[ids][..., None]
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        logits: Tensor = self.head(self.scale * normed * self.gate(normed))
        return logits


def test_what_scales_a_whole_row_keeps_sixteen_bits_or_more() -> None:
    torch.manual_seed(12)
    model = _RootMeanSquare()
    with fv.compress_activations(model, error=0.5, options=fv.ActivationOptions(smallest=1, audit_every=1)) as store:
        for _ in range(14):
            ids = torch.randint(0, 50, (16, 65))
            _loss(model, [ids[:, :-1]], ids[:, 1:].flatten()).backward()
    assert store.latest is not None
    rows = {name: kept for name, kept in store.latest.sites.items() if kept.original == 4 * 16 * 64}
    assert any(":saved.rsqrt" in name for name in rows)
    held = {kept.level for kept in rows.values() if kept.held}
    assert held
    assert min(held) >= 16, rows
    assert min(kept.level for kept in store.latest.sites.values() if kept.form == "grouped") <= 4
    assert store.audits
    assert all(audited <= 0.5 for _, _, audited in store.audits)
