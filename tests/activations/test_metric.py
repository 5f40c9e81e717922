"""What errors are relative to: the weights of parameters, audits, and which sites get more bits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import gradients, relative_error, small_model
from torch import Tensor, nn

import foveate as fv
from foveate.activations.measure.ledger import recent
from foveate.activations.measure.metric import FLOOR, Weights, weights_of

ENERGIES = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), st.integers(1, 10_000)), min_size=1, max_size=12
).filter(lambda tensors: any(energy for energy, _ in tensors))


@given(ENERGIES, st.floats(0.1, 10))
def test_weights_are_what_the_definition_says(tensors: list[tuple[float, int]], scale: float) -> None:
    energy_T, count_T = (torch.tensor(column, dtype=torch.float64) for column in zip(*tensors, strict=True))
    wanted = [torch.full((count,), (energy / count) ** 0.5, dtype=torch.float64) for energy, count in tensors]
    for relative_to in fv.Relative:
        weight_T = weights_of(energy_T, count_T, relative_to)
        assert bool((weight_T > 0).all())
        # an error of a tenth of each tensor's size
        found = relative_error(wanted, [0.9 * w for w in wanted], relative_to)
        assert float((weight_T * energy_T).sum() * 0.01) ** 0.5 == pytest.approx(found, rel=1e-6)
        assert found <= 0.1 * (1 + 1e-6)
        # and no unit of the loss matters
        torch.testing.assert_close(weights_of(scale * energy_T, count_T, relative_to), weight_T / scale)


@given(ENERGIES)
def test_no_tensor_counts_for_more_than_the_floor_lets_it(tensors: list[tuple[float, int]]) -> None:
    energy_T, count_T = (torch.tensor(column, dtype=torch.float64) for column in zip(*tensors, strict=True))
    share_T = weights_of(energy_T, count_T, fv.Relative.EACH_PARAMETER) * energy_T
    assert bool((share_T <= count_T / count_T.sum() * (1 + 1e-9)).all())
    # at least half of the values are in tensors at or above the median: the floor does not touch them
    full = torch.isclose(share_T, count_T / count_T.sum(), rtol=1e-6, atol=0.0)
    assert 2 * float(count_T[full].sum()) >= float(count_T[energy_T > 0].sum()) * (1 - 1e-9)


def test_the_floor_is_a_share_of_the_median_root_mean_square() -> None:
    count_T = torch.tensor([10, 100, 50])
    square_T = torch.tensor([1e9, 4.0, 1e-9], dtype=torch.float64)
    weight_T = weights_of(square_T * count_T, count_T, fv.Relative.EACH_PARAMETER)
    torch.testing.assert_close(1 / (160 * weight_T), torch.tensor([1e9, 4.0, FLOOR**2 * 4.0], dtype=torch.float64))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=10))
def test_what_was_measured_last_counts_for_half(values: list[float]) -> None:
    rows = [torch.tensor([value, 2 * value], dtype=torch.float64) for value in values]
    mean_L = recent(rows)
    assert min(values) * (1 - 1e-12) <= float(mean_L[0]) <= max(values) * (1 + 1e-12)
    assert float(mean_L[1]) == pytest.approx(2 * float(mean_L[0]))
    if len(values) > 1:
        torch.testing.assert_close(mean_L, (recent(rows[:-1]) + rows[-1]) / 2)
    else:
        assert torch.equal(mean_L, rows[0])


def test_weights_by_place() -> None:
    energy_T, count_T = torch.tensor([3.0, 1.0, 8.0]), torch.tensor([1, 3, 2])
    weights = Weights(["a.0.w", "a.1.w", "b"], [7, 8, 9], energy_T, count_T, fv.Relative.EACH_PARAMETER)
    at = weights_of(energy_T, count_T, fv.Relative.EACH_PARAMETER).tolist()
    assert weights.of(8) == at[1]
    assert weights.near("a.0") == weights.near("a.0.inner.act") == at[0]
    assert weights.near("a") == weights.near("a.gelu") == pytest.approx((at[0] + 3 * at[1]) / 4)
    assert weights.near("outside") == weights.of(1) == pytest.approx((at[0] + 3 * at[1] + 2 * at[2]) / 6)
    assert weights.error({7: 2.0, 9: 5.0}) == pytest.approx(2 * at[0] + 5 * at[2])
    even = Weights(["a.0.w", "a.1.w", "b"], [7, 8, 9], energy_T, count_T, fv.Relative.WHOLE_GRADIENT)
    assert [even.of(7), even.near("a"), even.near("")] == pytest.approx([1 / 12] * 3)


class Uneven(nn.Module):
    """Two layers of one size, one of which the loss hardly depends on, a frozen one and one that is left out."""

    def __init__(self, faint: float) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.idle = nn.Linear(512, 512)
        self.faint = faint

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.loud(x) + self.faint * F.gelu(self.quiet(torch.tanh(self.frozen(x))))
        return y


def _bits(model: nn.Module, relative_to: fv.Relative) -> tuple[dict[str, int], fv.ActivationStore]:
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    with fv.compress_activations(model, error=0.1, relative_to=relative_to) as store:
        for _ in range(12):
            model(x).square().mean().backward()
            model.zero_grad()
    return {row.site.partition(":")[0]: row.bits for row in store.report().rows if "linear" in row.site}, store


def test_a_layer_whose_gradient_is_tiny_gets_bits_where_each_parameter_counts() -> None:
    torch.manual_seed(0)
    model = Uneven(0.03)
    whole, _ = _bits(model, fv.Relative.WHOLE_GRADIENT)
    each, _ = _bits(model, fv.Relative.EACH_PARAMETER)
    assert whole["quiet"] == 2
    assert each["quiet"] > 2
    assert each["quiet"] >= whole["quiet"]


@settings(max_examples=6)
@given(st.sampled_from([1.0, 0.1, 0.03, 0.01]), st.sampled_from(fv.Relative))
def test_audits_say_what_the_definition_says(faint: float, relative_to: fv.Relative) -> None:
    torch.manual_seed(1)
    model = Uneven(faint)
    x = torch.randn(256, 64)
    model(x).square().mean().backward()
    wanted = gradients(model)
    seen = 0
    with fv.compress_activations(
        model, error=0.3, relative_to=relative_to, options=fv.ActivationOptions(audit_every=1)
    ) as store:
        for _ in range(8):
            model(x).square().mean().backward()
            found = gradients(model)
            assert store.latest is not None
            if store.latest.audit is not None:
                seen += 1
                assert store.latest.audit == pytest.approx(relative_error(wanted, found, relative_to), rel=1e-4)
    assert seen >= 3


@pytest.mark.parametrize("relative_to", fv.Relative)
def test_the_predicted_error_is_what_audits_find(relative_to: fv.Relative) -> None:
    model = small_model()
    twin = copy.deepcopy(model)
    x = torch.randn(512, 16)
    shares = []
    with fv.compress_activations(
        model, error=0.2, relative_to=relative_to, options=fv.ActivationOptions(audit_every=1, smallest=1)
    ) as store:
        for _ in range(16):
            F.cross_entropy(model(x), torch.arange(512) % 4).backward()
            model.zero_grad()
    for _, predicted, audited in store.audits[2:]:
        assert audited < 0.2
        shares.append(audited / predicted)
    assert 0.7 < sum(shares) / len(shares) < 1.4
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_weight_that_is_made_from_parameters_is_probed() -> None:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    with fv.compress_activations(model, error=0.2, options=fv.ActivationOptions(audit_every=1)) as store:
        for _ in range(8):
            model(torch.randn(256, 64)).square().mean().backward()
    site = next(site for name, site in store.planner.ledger.sites.items() if "linear" in name)
    assert not site.closed
    for _, predicted, audited in store.audits:
        assert 0.5 < audited / predicted < 2


def test_one_weight_with_two_inputs_and_one_input_of_two_weights() -> None:
    """The closed form of a site is weighted by each consumer's own weight; a tied one has the sum of both gradients."""
    torch.manual_seed(0)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.one(x) + 0.05 * self.two(x)
            return y + 0.3 * self.one(torch.roll(x, 1, 0))

    model, x = Shared(), torch.randn(256, 64)
    model(x).square().mean().backward()
    wanted = gradients(model)
    with fv.compress_activations(model, error=0.2) as store:
        for _ in range(3):
            model(x).square().mean().backward()
            model.zero_grad()
    errors = {site.name: store.planner.ledger.errors(site) for site in store.planner.ledger.stored_sites()}
    own = next(error for name, error in errors.items() if name.endswith("one:saved.linear.0.0"))
    total = 0.0
    for seed in range(40):
        pattern = {name: 4 for name in errors if name.endswith("one:saved.linear.0.0")}
        with fv.compress_activations(model, levels=pattern, options=fv.ActivationOptions(seed=seed)):
            model(x).square().mean().backward()
        total += relative_error(wanted, gradients(model), fv.Relative.EACH_PARAMETER) ** 2 / 40
    assert own[1] == pytest.approx(total, rel=0.15)


class Gated(nn.Module):
    """What a gate does to the gradient is decided by a buffer, which nothing measures."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("scale", torch.tensor(0.01))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(x) + self.scale * torch.sin(3 * self.up(x))
        return y


def test_a_broken_bound_makes_it_probe_anew() -> None:
    torch.manual_seed(0)
    model = Gated()
    probed: dict[int, tuple[str, ...]] = {}
    with fv.compress_activations(
        model,
        error=0.1,
        relative_to=fv.Relative.WHOLE_GRADIENT,
        options=fv.ActivationOptions(audit_every=40, profile_every=1000),
    ) as store:
        for number in range(56):
            model.scale.fill_(0.01 if number < 35 else 30.0)
            model(torch.randn(256, 64)).square().mean().backward()
            assert store.latest is not None
            probed[number] = store.latest.probed
    broken = [step for step, _, audited in store.audits if audited > 0.1]
    assert broken
    assert broken[0] == 40
    assert not any(probed[number] for number in range(33, 40))
    assert probed[41]
    # and what is learned is used
    last = store.planner.predicted()
    assert last < 0.1


def test_a_parameter_without_values_has_no_weight() -> None:
    class WithNothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.nothing = small_model(), nn.ParameterList([nn.Parameter(torch.empty(0, 4))])

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.body(x), self.nothing[0]])

    model = WithNothing()
    with fv.compress_activations(model, error=0.2, options=fv.ActivationOptions(smallest=1)) as store:
        for _ in range(8):
            model(torch.randn(64, 16)).square().mean().backward()
    assert store.audits
    assert all(0 < audited < 1 for _, _, audited in store.audits)
