"""The ways people train: autocast, low precision, checkpoints, compilers, functorch, subclasses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_training import equal, errors, most_error, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foveate as fv


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks, each of them checkpointed or not."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(32, 8)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1, self.training)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        out: Tensor = self.head(x)
        return out


def _step(model: Callable[[Tensor], Tensor], autocast: bool = False, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 9, 32).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x).flatten(0, 1).float(), torch.arange(36) % 8)
    loss.backward()


def _steps(model: Callable[[Tensor], Tensor], count: int) -> None:
    for _ in range(count):
        _step(model)


def _gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def _check(
    model: nn.Module,
    step: Callable[[], None],
    within: float = 0.1,
    lossy: tuple[dict[str, Any], ...] = (
        {"levels": 8},
        {"error": 0.1},
        {"error": 0.1, "relative_to": fv.Relative.WHOLE_GRADIENT},
    ),
) -> None:
    """Exact at 32 bits, near at 8 and where errors are measured; torch's random state the same after all."""
    step()
    wanted, state = _gradients(model), torch.get_rng_state()
    with fv.compress_activations(model, levels=32, options=fv.ActivationOptions(smallest=1)):
        step()
    found = _gradients(model)
    assert len(wanted) == len(found) > 0
    assert all(map(torch.equal, wanted, found))
    assert torch.equal(state, torch.get_rng_state())
    for settings in lossy:
        with fv.compress_activations(model, **settings, options=fv.ActivationOptions(smallest=1)) as store:
            for _ in range(4):
                model.zero_grad()
                step()
            found = _gradients(model)
        assert torch.equal(state, torch.get_rng_state())
        assert store.steps
        relative_to = settings.get("relative_to", fv.Relative.EACH_PARAMETER)
        assert relative_error(wanted, found, relative_to) < within


def test_autocast() -> None:
    model = Model()
    _check(model, lambda: _step(model, autocast=True))
    with fv.compress_activations(model, levels=32, options=fv.ActivationOptions(smallest=1)) as store:
        _step(model, autocast=True)
    assert store.latest is not None
    weights = sum(2 * p.numel() for p in model.parameters() if p.dim() == 2)  # their copies, which plain training keeps
    largest = max(kept.original for kept in store.latest.sites.values())
    assert store.latest.held < store.latest.original
    assert largest < weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model = Model().to(dtype)
    _check(model, lambda: _step(model, dtype=dtype))


def test_checkpoints_that_are_not_reentrant() -> None:
    model = Model(reentrant=False)
    _check(model, lambda: _step(model))
    with fv.compress_activations(model, error=0.1, options=fv.ActivationOptions(smallest=1)) as store:
        for _ in range(6):
            _step(model)
    assert store.audits  # a checkpoint can be run again


def test_reentrant_checkpoints() -> None:
    model = Model(reentrant=True)
    _check(model, lambda: _step(model), lossy=())
    with fv.compress_activations(model, error=0.1, options=fv.ActivationOptions(smallest=1)) as store:
        _step(model)
        with pytest.warns(RuntimeWarning, match="reentrant"):
            _step(model)
        _step(model)
    assert not store.audits
    assert store.steps == 3


def test_entered_inside_a_checkpoint_it_warns() -> None:
    model = Model()

    def inner(x: Tensor) -> Tensor:
        with fv.compress_activations(model, levels=32, options=fv.ActivationOptions(smallest=1)):
            out: Tensor = model(x)
        return out

    x = torch.randn(4, 9, 32, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="inside a checkpointed function"):
        out = checkpoint(inner, x, use_reentrant=False)
    assert out.shape == (4, 9, 8)


@pytest.mark.parametrize("outside", [True, False])
def test_compiled_models(outside: bool) -> None:
    model = Model().eval()
    _step(model)
    wanted = _gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile, about itself
        compiled = torch.compile(model, backend="aot_eager")
        if outside:
            _step(compiled)
            model.zero_grad()
        for settings in ({"levels": 32}, {"levels": 8}, {"error": 0.1}):
            with fv.compress_activations(model, **settings, options=fv.ActivationOptions(smallest=1)):  # type: ignore[arg-type]
                for _ in range(3):
                    model.zero_grad()
                    _step(compiled)
            for w, f in zip(wanted, _gradients(model), strict=True):
                if settings.get("levels") == 32:
                    torch.testing.assert_close(w, f)
                else:
                    assert (w - f).norm() < 0.1 * w.norm() + 1e-3
    torch._dynamo.reset()


@pytest.fixture
def _compiler() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # it says so of any hooks
        yield
    torch._dynamo.reset()


def _blocks_compiled(model: Model) -> Model:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


COMPILED: dict[str, Callable[[Model], Callable[[Tensor], Tensor]]] = {
    "module": lambda model: torch.compile(model, backend="aot_eager"),
    "parts": _blocks_compiled,
    "function": lambda model: torch.compile(lambda x: model(x), backend="aot_eager"),
}


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("what", COMPILED)
def test_what_compiled_functions_keep_is_said_once_and_in_the_report(what: str) -> None:
    model = Model()
    call = COMPILED[what](model)
    given = call if what == "module" else model
    assert isinstance(given, nn.Module)
    with (
        fv.compress_activations(given, levels=4, options=fv.ActivationOptions(smallest=1)) as store,
        pytest.warns(RuntimeWarning, match="what compiled functions keep") as said,
    ):
        _steps(call, 2)
    assert len([w for w in said if "compiled functions" in str(w.message)]) == 1
    report = store.report()
    assert 0.5 * report.bytes_before < report.bytes_compiled <= report.bytes_after
    assert report.to_json()["bytes_compiled"] == report.bytes_compiled
    assert "by compiled functions, which cannot be made smaller)" in str(report)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("way", ["eager", "stance", "uncompiled", "exact"])
def test_what_the_warning_recommends_works(way: str) -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager" if way == "eager" else "aot_eager")
    stance = torch.compiler.set_stance("force_eager" if way in ("stance", "uncompiled") else "default")
    with (
        stance,
        fv.compress_activations(
            model, levels=32 if way == "exact" else 4, options=fv.ActivationOptions(smallest=1)
        ) as store,
    ):
        _step(model if way == "uncompiled" else compiled)
    report = store.report()
    if way == "exact":  # nothing was to be rounded: the report says what is compiled, and no warning does
        assert report.bytes_compiled > 0
    else:
        assert report.ratio > 4
        assert report.bytes_compiled == 0


def test_nothing_happens_without_gradients() -> None:
    model = Model().eval()
    x = torch.randn(4, 9, 32)
    wanted = model(x)
    with fv.compress_activations(model, levels=4, options=fv.ActivationOptions(smallest=1)) as store:
        with torch.no_grad():
            assert torch.equal(wanted, model(x))
        with torch.inference_mode():
            assert torch.equal(wanted, model(x))
        assert store._step is None
        made = torch.ones(3, device="meta", requires_grad=True)
        (made.exp() * made).sum().backward()
        assert made.grad is not None


def test_functorch() -> None:
    model = Model().eval()
    x = torch.randn(4, 9, 32)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    mapped = torch.func.vmap(model)(x)
    called = torch.func.functional_call(model, parameters, (x,))
    wanted = torch.autograd.grad(called.square().sum(), list(parameters.values()))
    with fv.compress_activations(model, levels=32, options=fv.ActivationOptions(smallest=1)):
        assert torch.equal(mapped, torch.func.vmap(model)(x))
        called = torch.func.functional_call(model, parameters, (x,))
        found = torch.autograd.grad(called.square().sum(), list(parameters.values()))
        over = torch.func.vmap(model)(x)
        over.sum().backward()
        # torch's own limit: transforms that differentiate refuse hooks of any kind
        with pytest.raises(RuntimeError, match="saved tensor hooks"):
            torch.func.grad(lambda t: t.square().sum())(x)
    assert all(map(torch.equal, wanted, found))
    assert all(p.grad is not None for p in model.parameters())


def test_sparse_complex_and_subclasses_pass_through() -> None:
    class Marked(Tensor):
        pass

    weight = nn.Parameter(torch.randn(6, 6))
    indices = torch.tensor([[0, 2, 4], [1, 1, 5]])

    def run() -> list[Tensor]:
        weight.grad = None
        sparse = torch.sparse_coo_tensor(indices, weight[0, :3].exp(), (6, 6), check_invariants=True).coalesce()
        out = torch.sparse.mm(sparse, weight).square().sum()
        out = out + torch.fft.fft(weight.exp()).mul(torch.polar(weight.exp(), weight)).abs().square().sum()
        out = out + (weight.sigmoid().as_subclass(Marked).square() * weight.tanh()).sum().as_subclass(Tensor)
        out = out + torch.fft.rfft(weight).conj().imag.square().sum()
        out.backward()
        assert weight.grad is not None
        return [weight.grad.clone()]

    wanted = run()
    for settings in ({"levels": 32}, {"levels": 4}, {"error": 0.1}):
        with fv.compress_activations(nn.ParameterList([weight]), **settings, options=fv.ActivationOptions(smallest=1)):  # type: ignore[arg-type]
            found = run()
            run()
        assert found[0].isfinite().all()
        assert errors(wanted, found) <= most_error(settings)  # type: ignore[arg-type]
        assert equal(wanted, found) == (settings.get("levels") == 32)


def test_masks_of_activation_functions_to_the_bit() -> None:
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42, -1e-42, 6.0, 3.0, -3.0, 1.0, -1.0, 2.0])
    values = torch.cat([odd, torch.randn(300) * 4])
    functions: list[Callable[[Tensor], Tensor]] = [
        *(F.relu, F.leaky_relu, F.relu6, F.hardtanh, F.hardsigmoid, lambda t: F.threshold(t, 1, 0)),
        *(lambda t: F.relu(t, inplace=True), lambda t: F.leaky_relu(t, 0.3, inplace=True)),
        *(lambda t: F.hardtanh(t, -2.0, 3.0), lambda t: F.hardtanh(input=t, min_val=-2.0, max_val=3.0, inplace=True)),
        *(lambda t: t.clamp(-1, 3), lambda t: t.clamp(min=3.0), lambda t: t.clamp(max=-1.0), lambda t: t.clamp_min(1)),
        *(
            lambda t: torch.clamp(input=t, max=3, min=1),
            lambda t: t.clamp_(3, -3),
            lambda t: t.clamp(torch.tensor(1.0)),
        ),
        *(lambda t: F.relu(t) * F.leaky_relu(F.relu(t)), lambda t: t.clamp(-1, 1) + t.clamp(-2, 2)),
    ]
    for function in functions:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            leaf = values.to(dtype).requires_grad_()

            def gradient(leaf: Tensor = leaf, function: Callable[[Tensor], Tensor] = function) -> Tensor:
                return torch.autograd.grad(function(leaf * 1).nan_to_num().sum(), leaf, allow_unused=True)[0]

            def through(leaf: Tensor = leaf, function: Callable[[Tensor], Tensor] = function) -> Tensor:
                out = function(leaf * 1)
                return torch.autograd.grad(out, leaf, torch.ones_like(out))[0]

            for run in (gradient, through):
                wanted = run()
                for level in (32, 4):
                    with fv.compress_activations(
                        nn.Linear(1, 1), levels=level, options=fv.ActivationOptions(smallest=1)
                    ) as store:
                        found = run()
                    assert store.latest is not None
                    assert torch.equal(wanted.nan_to_num(7.0), found.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("function", "share"),
    [
        (F.relu, 1 / 32),
        (F.leaky_relu, 1 / 32),
        (F.relu6, 1 / 32),
        (lambda t: t.clamp(0, 1), 1 / 32),
        (lambda t: F.dropout(t, 0.3), 1 / 32),
        (lambda t: F.dropout1d(t.view(16, 16, 16)), 1 / 16),
        (lambda t: F.alpha_dropout(t, 0.3, training=True), 1 / 32),
        (lambda t: t.masked_fill(t.detach() > 0, 2.0), 1 / 32),
        (lambda t: torch.where(t.detach() > 0, t, -t), 1 / 32),
        (lambda t: F.max_pool2d(t.view(1, 1, 64, 64), 2), 1 / 8),
        (lambda t: F.avg_pool2d(t.view(1, 1, 64, 64), 2), 0.0),
    ],
)
def test_lossless_forms_take_what_they_should(function: Callable[[Tensor], Tensor], share: float) -> None:
    leaf, model = torch.randn(4096, requires_grad=True), nn.Linear(1, 1)
    torch.manual_seed(5)
    wanted = torch.autograd.grad(function(leaf * 1).square().sum(), leaf)[0]
    torch.manual_seed(5)
    with fv.compress_activations(model, levels=32, options=fv.ActivationOptions(smallest=1)) as store:
        out = function(leaf * 1)
        assert store._step is not None
        held = store._step.held
        assert torch.equal(wanted, torch.autograd.grad(out.square().sum(), leaf)[0])
    assert held <= share * 4 * 4096 + 64


def test_copies_are_independent() -> None:
    model = Model()
    twin = copy.deepcopy(model)
    with fv.compress_activations(model, levels=32, options=fv.ActivationOptions(smallest=1)):
        _step(twin)
        _step(model)
    assert all(map(torch.equal, _gradients(model), _gradients(twin)))
