"""adapt_to_input on tiny models: the mean of the bits, what withdraws, the verdict, and what is seen of decisions."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import foveate as fv
from foveate.errors import BudgetError, DataError, FoveateError
from foveate.inputs.adapt import nearest
from foveate.inputs.gradients import output_gradients
from foveate.inputs.multiplier import Correction, Shares, corrected, solved
from foveate.inputs.verdict import ratio_interval
from foveate.nn.levels import set_index
from inputs.choosing import QUIET, data
from tiny import generator, mlp, quantized_llama, rows, tokens

BITS = 4.5


def test_the_mean_of_the_bits_is_the_target_and_withdraws(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, _ = quantized
    before = fv.state_of(model)
    x = torch.cat(data(9))
    plain = model(x)
    with fv.adapt_to_input(model, bits=BITS, batches=data(), progress=False) as adapted:
        assert adapted.verdict is not None
        assert adapted.verdict.samples == 32
        assert abs(adapted.verdict.bits - BITS) < 0.1
        state = fv.state_of(model)
        ((low, high),) = state.ends
        assert state.frontier.bits(low) < BITS - 0.1
        assert state.frontier.bits(high) > BITS + 0.1
        model(torch.cat(data()[:3]))
        samples, bits, spent = adapted.tally()
        assert samples == 96
        assert spent == bits
        assert bits == pytest.approx(BITS, rel=0.01)
        together = model(x)
        assert torch.equal(together, torch.cat([model(row) for row in x.split(1)]))  # a row decides alone
        ends = [_at(model, state.frontier[i], x) for i in (low, high)]
        assert not torch.equal(together, ends[0])
        assert not torch.equal(together, ends[1])
        assert torch.equal(model(x), together)
        assert f"{BITS:g} bits on average" in str(adapted)
    assert fv.state_of(model) == before
    assert torch.equal(model(x), plain)


def _at(model: nn.Module, plan: fv.PrecisionMap, x: Tensor) -> Tensor:
    fv.apply(model, plan, decider="test")
    y: Tensor = model(x)
    fv.withdraw(model, "test")
    return y


def test_gradients_read_what_the_rows_decided(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, _ = quantized
    x = torch.cat(data(9))
    with fv.adapt_to_input(model, bits=BITS, batches=data(), options=QUIET, progress=False):
        plain = model(x)
        given = x.clone().requires_grad_()
        y = model(given)
        assert torch.equal(y.detach(), plain)
        y.sum().backward()
        assert given.grad is not None
        alone = x[3:4].clone().requires_grad_()
        model(alone).sum().backward()
        assert alone.grad is not None
        assert torch.allclose(given.grad[3:4], alone.grad, rtol=1e-5, atol=1e-6)


def test_tiers_are_fixed_and_floors_hold(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, _ = quantized
    x = torch.cat(data(9))[:2]
    with fv.adapt_to_input(model, bits=BITS, batches=data(), options=QUIET, progress=False) as adapted:
        best = _at(model, adapted.frontier[0], x)
        with fv.row_precision(model, [fv.Request(tier=0), None]):
            assert torch.equal(model(x)[:1], best[:1])
            assert fv.state_of(model).ends[1] == (0, 0)
        ((low, high),) = fv.state_of(model).ends
        with fv.floor(model, index=high):
            assert fv.state_of(model).ends == ((high, max(high - adapted.adaptation.above, 0)),)
        set_index(model, low, decider="runtime")
        assert fv.state_of(model).ends[0][0] > low
        price = adapted.correction.multiplier
        model(x)
        adapted.correct()  # the mean is not its own to hold now
        assert (adapted.correction.multiplier, adapted.correction.rows) == (price, 0)
        fv.withdraw(model, "runtime")


def test_explain(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, _ = quantized
    x = data(9)[0]
    with pytest.raises(FoveateError, match="do not choose between maps"):
        fv.explain(model, x)
    with fv.adapt_to_input(model, bits=BITS, batches=data(), options=QUIET, progress=False) as adapted:
        adapted.tally()
        found = fv.explain(model, x)
        bits = adapted.tally().bits
        assert torch.equal(found.output, model(x))
        assert list(found.precision_map) == ["0:weight", "2:weight", "4:weight"]
        assert float(found.token_bits.mean()) == pytest.approx(bits, rel=1e-5)
        layer = found.layers[0]
        assert layer.rows == (32,)
        assert layer.levels[0] < layer.levels[1]
        assert torch.equal(layer.reads_high, layer.estimated > layer.threshold)
        config = found.layer_config("0:weight", 3)
        assert config.input_bits == 8
        assert config.scale == pytest.approx(float(x[3].abs().max()) / 127, rel=1e-6)
        assert (config.zero_point, config.reads_high) == (0, bool(layer.reads_high[3]))
        # the weights are small: every strip whose levels differ is in the sample
        assert torch.allclose(layer.estimated, layer.true, rtol=1e-4)
        assert "0 " in str(found)
        with pytest.raises(KeyError, match="was not multiplied"):
            found.layer_config("nothing", 0)


def test_a_decoder_and_a_compiled_one() -> None:
    model, _ = quantized_llama()
    batches = tokens(8, 12, 4)
    ids = batches[0]["input_ids"]
    with fv.adapt_to_input(model, bits=5.0, batches=batches, options=QUIET, progress=False), torch.no_grad():
        eager = model(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, eager, atol=1e-4)
        torch._dynamo.reset()
        found = fv.explain(model, {"input_ids": ids, "use_cache": False})
        assert found.layers[0].rows == ids.shape
        assert len(found.token_bits) == ids.numel()


def test_convolutions_decide_for_each_patch() -> None:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3))
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1152, 5))
    images = list(torch.randn(16, 3, 8, 8, generator=generator(1)).split(4))
    fv.quantize(model, images, objective=fv.Logits(), progress=False)
    with fv.adapt_to_input(model, bits=5.0, batches=images, options=QUIET, progress=False) as adapted:
        adapted.tally()
        y = model(images[0])
        samples, bits, _ = adapted.tally()
        assert samples == pytest.approx(4)
        assert abs(bits - 5.0) < 0.3
        assert torch.allclose(torch.cat([model(one) for one in images[0].split(1)]), y, atol=1e-5)


def test_the_correction_runs_by_itself(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, _ = quantized
    x = torch.cat(data())
    with fv.adapt_to_input(model, bits=BITS, batches=data(), options=QUIET, progress=False) as adapted:
        price = adapted.correction.multiplier
        adapted.correction = Correction(target=BITS, span=0.5, every=100, multiplier=price)
        model(x[:64])
        assert adapted.correction.multiplier == price
        model(20 * x)  # errors are larger, and more rows read the higher map
        assert adapted.correction.multiplier > price
        assert adapted.bits > BITS
        assert adapted.adaptation.multiplier == adapted.correction.multiplier


def test_copies_choose_too(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, _ = quantized
    x = data(9)[0]
    with fv.adapt_to_input(model, bits=BITS, batches=data(), options=QUIET, progress=False):
        other = copy.deepcopy(model)
        y = model(x)
    assert torch.equal(other(x), y)


def test_gradients_are_those_of_the_outputs() -> None:
    model = mlp((70, 40, 10))
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    fv.apply(model, profile.uniform(8, 32))
    batches = rows(48, 70, 2, seed=3)
    found = output_gradients(model, batches, fv.Logits(), seed=7, progress=False)
    assert set(found.squares) == {"0:weight", "2:weight"}
    assert found.rows == {"0:weight": 1.0, "2:weight": 1.0}
    g = torch.Generator().manual_seed(7)
    expected = torch.zeros(10)
    for batch in batches:
        logits = model(batch).detach().requires_grad_()
        loss, _ = fv.Logits().loss(logits, batch, g)
        (gradient,) = torch.autograd.grad(loss, logits)
        expected += gradient.square().sum(0)
    assert torch.allclose(found.squares["2:weight"], expected / 48, rtol=1e-4)
    with pytest.raises(DataError, match="no output of a weight on planes has a gradient"):
        output_gradients(model, [], fv.Logits(), progress=False)


@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    st.floats(0.05, 0.95),
    st.integers(0, 100),
)
def test_the_price_meets_the_target(more: list[float], share: float, seed: int) -> None:
    shares = Shares(low=3.0, more={str(i): bits for i, bits in enumerate(more)})
    errors = {str(i): torch.rand(500, generator=generator(seed + i)).square() for i in range(len(more))}
    unit = {name: 0.1 + 0.3 * i for i, name in enumerate(errors)}
    target = 3.0 + share * sum(more)
    price = solved(shares, errors, unit, target)
    read = {name: float((found > unit[name] * price).float().mean()) for name, found in errors.items()}
    # a share is a multiple of 1 / 500
    assert abs(shares.mean(read) - target) <= sum(more) / 500 + 1e-6
    with pytest.raises(BudgetError, match=r"is not between 3 and"):
        solved(shares, errors, unit, 2.9)


@given(st.floats(0.2, 5.0), st.floats(0.5, 2.0), st.integers(0, 50))
def test_the_correction_holds_the_mean_when_inputs_change(start: float, change: float, seed: int) -> None:
    """Estimates are drawn from a distribution that is suddenly larger or smaller by a factor."""
    g = generator(seed)
    state = Correction(target=4.0, span=0.5, multiplier=start)
    bits = 0.0
    for _ in range(60):
        errors = -change * torch.rand(4096, generator=g).log()
        bits = 3.75 + 0.5 * float((errors > 0.693 * state.multiplier).float().mean())
        state = corrected(state, 4096, bits)
    assert abs(bits - 4.0) < 0.01 * 4.0
    assert state.rows == 60 * 4096
    assert corrected(state, 0, 5.0) is state
    assert corrected(state, 10, float("nan")) is state
    assert corrected(state, 4096, 4.001).multiplier == state.multiplier


def test_the_interval_of_a_ratio() -> None:
    g = generator(0)
    theirs = torch.rand(4096, generator=g)
    low, high = ratio_interval(0.9 * theirs, theirs)
    assert low == pytest.approx(0.9, rel=1e-6)
    assert high == pytest.approx(0.9, rel=1e-6)
    low, high = ratio_interval(torch.rand(4096, generator=g), theirs)
    assert low < 1 < high


def test_what_is_refused(quantized: tuple[nn.Module, fv.Profile]) -> None:
    model, _ = quantized
    for keywords, message in (
        ({"bits": 4.5, "batches": []}, "there are no batches"),
        ({"bits": 99.0, "batches": data()}, "a target of 99 bits has no maps 0.25 bits around it"),
    ):
        with pytest.raises(FoveateError, match=message):
            fv.adapt_to_input(model, progress=False, **keywords)
    assert fv.state_of(model).adaptations == {}
    with pytest.raises(BudgetError, match=r"every \(=0\) is not positive"):
        Correction(target=4.0, span=0.5, every=0)
    chain = fv.Frontier((fv.profile_of(model).uniform(8), fv.profile_of(model).uniform(4)))
    assert nearest(chain, 4.4) == 1


def test_where_most_weights_do_not_choose_the_lower_map_is_further_away() -> None:
    """Embeddings read the higher map, and here they are most of the weights."""
    model, profile = quantized_llama(vocab_size=600, tie_word_embeddings=False)
    bits = fv.frontier(profile, 160).bits(80)
    with fv.adapt_to_input(model, bits=bits, batches=tokens(8, 24), options=QUIET, progress=False) as adapted:
        low, _ = adapted.adaptation.around(adapted.index, len(adapted.frontier) - 1)
        assert adapted.frontier.bits(low) < bits - 0.4
        with torch.no_grad():
            model(**tokens(8, 24)[0])
        assert adapted.tally().bits == pytest.approx(bits, rel=0.05)
