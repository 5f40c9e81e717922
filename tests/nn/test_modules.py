"""A quantized model is used like any other: copied, cast, saved as a state_dict, trained around."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.errors import FoveateError, LevelError, PlaneNotResidentError, SiteError
from foveate.nn.modules import PlaneLinear, on_planes
from tiny import llama, mlp, quantized_llama, quantized_mlp, resident_bytes, rows, tokens

X = rows(seed=5)[0]


def test_apply_reads_other_levels_and_moves_nothing() -> None:
    model, profile = quantized_mlp()
    places = [(t.data_ptr(), t.numel()) for t in model.buffers()]
    outputs = {}
    for level in (8, 2, 8, 4, 2):
        fv.apply(model, profile.uniform(level))
        y = model(X)
        assert torch.equal(outputs.setdefault(level, y), y)
        assert fv.current_map(model) == profile.uniform(level)
        assert int(model[0].input_level[0]) == (16 if level == 8 else 8)
    assert [(t.data_ptr(), t.numel()) for t in model.buffers()] == places
    assert not torch.equal(outputs[2], outputs[4])


def test_a_map_of_mixed_tiles_is_applied_tile_by_tile() -> None:
    model, profile = quantized_mlp()
    plan = fv.allocate(profile, fv.Budget(bits=9))
    fv.apply(model, plan)
    for site in profile.weight_sites():
        levels = plan.levels[site.name]
        tiles = bytes([levels]) * site.tiles if isinstance(levels, int) else levels
        weight = model.get_submodule(site.name.removesuffix(":weight")).weight
        assert bytes(weight.value.active_levels[0].flatten().tolist()) == tiles


def test_errors_of_apply_change_nothing() -> None:
    model, profile = quantized_mlp()
    plan = profile.uniform(3)
    fv.apply(model, plan)
    before = model(X)
    other, other_profile = quantized_llama()
    with pytest.raises(SiteError, match="the map is of another model: they differ in"):
        fv.apply(model, other_profile.uniform(4))
    with pytest.raises(SiteError, match="shapes or groups differ"):
        fv.apply(model, fv.quantize(mlp(), rows(), group=64, progress=False).uniform(4))
    with pytest.raises(SiteError, match="is not a PrecisionMap"):
        fv.apply(model, "4")  # type: ignore[arg-type]
    with pytest.raises(LevelError):
        fv.apply(model, plan.with_level("*:weight", 5))
    assert fv.current_map(model) == plan
    assert torch.equal(model(X), before)
    assert fv.current_map(other) == other_profile.uniform(8)
    with pytest.raises(FoveateError, match=r"is not quantized: call foveate\.quantize or foveate\.load first"):
        fv.apply(mlp(), plan)


def test_levels_that_are_not_resident() -> None:
    import tempfile

    model, profile = quantized_mlp()
    with tempfile.TemporaryDirectory() as folder:
        fv.save(model, folder)
        loaded = fv.load(folder, keep=4, model=mlp())
    before = loaded(X)
    for plan in (profile.uniform(6), profile.uniform(2).with_level("2:weight", 8)):
        with pytest.raises(
            PlaneNotResidentError, match=r"at level [68]: some of its tiles are stored up to 4 bits only"
        ):
            fv.apply(loaded, plan)
    assert torch.equal(loaded(X), before)
    fv.apply(loaded, profile.uniform(3))


def test_deepcopy_is_a_model_of_its_own() -> None:
    model, profile = quantized_mlp()
    fv.apply(model, profile.uniform(4))
    other = copy.deepcopy(model)
    assert torch.equal(other(X), model(X))
    fv.apply(other, profile.uniform(2))
    assert fv.current_map(model) == profile.uniform(4)
    assert not torch.equal(other(X), model(X))
    fv.apply(model, profile.uniform(2))
    assert torch.equal(other(X), model(X))
    assert other[0].weight.plane0.data_ptr() != model[0].weight.plane0.data_ptr()


def test_a_copy_of_tied_weights_stays_tied() -> None:
    model, profile = quantized_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    fv.apply(other, profile.uniform(2))
    assert int(other.lm_head.weight.value.active_levels.max()) == 2
    assert int(model.lm_head.weight.value.active_levels.max()) == 8


def test_torch_save_of_the_whole_model() -> None:
    model, profile = quantized_mlp()
    fv.apply(model, profile.uniform(4))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(X), model(X))
    fv.apply(other, profile.uniform(2))
    fv.apply(model, profile.uniform(2))
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_holds_the_weights_and_not_the_levels(assign: bool) -> None:
    model, profile = quantized_mlp()
    torch.manual_seed(3)
    other = mlp(seed=3)
    fv.quantize(other, rows(), objective=fv.Logits(), progress=False)
    fv.apply(model, profile.uniform(2))
    fv.apply(other, profile.uniform(4))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not [key for key in state if "active_levels" in key or "input_level" in key]
    assert other.load_state_dict(state, assign=assign).missing_keys == []
    # levels are the map's: those in force stay in force
    assert fv.current_map(other) == profile.uniform(4)
    fv.apply(model, profile.uniform(4))
    assert torch.equal(other(X), model(X))
    smaller = mlp((70, 20, 10))
    fv.quantize(smaller, rows(), progress=False)
    with pytest.raises(RuntimeError, match=r"size mismatch"):
        smaller.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_leaves_the_planes_alone(dtype: torch.dtype) -> None:
    model, profile = quantized_mlp()
    planes = [t.clone() for t in model.buffers()]
    expected = model(X).detach()
    model.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(planes, model.buffers(), strict=True))
    assert model[0].bias.dtype == dtype
    y = model(X.to(dtype)).detach()
    assert y.dtype == dtype
    assert float((y.float() - expected).norm() / expected.norm()) < 8 * torch.finfo(dtype).eps
    fv.apply(model, profile.uniform(2))
    assert int(model[0].weight.value.active_levels.max()) == 2
    assert not torch.equal(model(X.to(dtype)), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", [False, True])
def test_half_precision_transformers(dtype: torch.dtype, before: bool) -> None:
    batch = tokens(seed=4)[0]
    if before:
        model = llama().to(dtype)
        fv.quantize(model, tokens(), progress=False)
    else:
        model = quantized_llama()[0].to(dtype)
    with torch.no_grad():
        expected = llama()(**batch).logits
        y = model(**batch).logits
    assert y.dtype == dtype
    assert float((y.float() - expected).norm() / expected.norm()) < 0.05


def test_float64_models_run() -> None:
    model = mlp().double()
    x = X.double()
    expected = model(x)
    fv.quantize(model, [b.double() for b in rows()], progress=False)
    assert model(x).dtype == torch.float64
    assert torch.allclose(model(x), expected, atol=0.05)


def test_other_devices_are_refused() -> None:
    model, _ = quantized_mlp()
    with pytest.raises(FoveateError, match="planes cannot move to meta"):
        model.to("meta")


def test_train_and_eval_are_those_of_any_module() -> None:
    model, _ = quantized_mlp()
    y = model.eval()(X)
    assert not model[0].training
    assert torch.equal(model.train()(X), y)
    assert model[0].training


def test_gradients_flow_through_to_inputs_and_biases() -> None:
    # smooth, so that a small change of an activation is a small change of a gradient
    model, original = (nn.Sequential(*(nn.Tanh() if isinstance(m, nn.ReLU) else m for m in mlp())) for _ in range(2))
    profile = fv.quantize(model, rows(), progress=False)
    fv.apply(model, profile.uniform(8))
    x, x2 = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(x).square().sum().backward()
    original(x2).square().sum().backward()
    assert x.grad is not None
    assert x2.grad is not None
    assert float((x.grad - x2.grad).norm() / x2.grad.norm()) < 0.05
    for i in (0, 2, 4):
        g, expected = model[i].bias.grad, original[i].bias.grad
        assert float((g - expected).norm() / expected.norm()) < 0.05
    # biases can be trained
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model[0].bias, original[0].bias)


def test_gradients_through_convolutions() -> None:
    torch.manual_seed(0)
    for conv in (nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2)):
        model = nn.Sequential(conv)
        original = copy.deepcopy(model)
        x = torch.randn(2, 4, 7, 7)
        fv.quantize(model, [x], progress=False)
        g, expected = (
            torch.autograd.grad(m(v := x.clone().requires_grad_()).square().sum(), v)[0] for m in (model, original)
        )
        assert float((g - expected).norm() / expected.norm()) < 0.05


def test_a_wrapper_finds_the_quantized_model_inside() -> None:
    model, profile = quantized_mlp()
    wrapped = nn.Sequential(model, nn.Softmax(-1))
    fv.apply(wrapped, profile.uniform(2))
    assert fv.current_map(wrapped) == fv.current_map(model) == profile.uniform(2)
    with pytest.raises(FoveateError, match="several quantized models"):
        fv.current_map(nn.Sequential(model, quantized_mlp()[0]))


def test_wrong_columns_are_an_error_as_for_any_linear_layer() -> None:
    model, _ = quantized_mlp()
    for columns in (69, 71, 96, 1, 200):
        with pytest.raises((FoveateError, RuntimeError)):
            model(torch.randn(2, columns))


def test_shapes() -> None:
    model, _ = quantized_mlp()
    for shape in ((70,), (0, 70), (3, 70), (2, 0, 70), (2, 3, 4, 70)):
        assert model(torch.randn(shape)).shape == (*shape[:-1], 10)
        assert torch.isfinite(model(torch.randn(shape))).all()


def test_representation_and_the_rest() -> None:
    model, _ = quantized_mlp()
    assert "40, 70, group=" in repr(model)
    assert "levels=8..8" in repr(model)
    assert model[0].weight.dtype == torch.float32
    assert model[0].weight.device == torch.device("cpu")
    assert isinstance(model[0], PlaneLinear)
    with pytest.raises(FoveateError, match="ReLU holds no weight"):
        on_planes(nn.ReLU(), model[0].weight)


def test_bytes_resident_are_the_bytes_of_the_model() -> None:
    for model, profile in (quantized_mlp(), quantized_llama(), quantized_llama(tie_word_embeddings=True)):
        assert profile.uniform(8).bytes_resident == resident_bytes(model)


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.data,
        lambda w: w.t(),
        lambda w: w.norm(),
        lambda w: w.squeeze(1),
        lambda w: w[:, 0],
        lambda w: w * 2,
        lambda w: 2 * w,
        lambda w: torch.randn(3, 40) @ w.t(),
        lambda w: torch.randn(3, 24) @ w,
    ],
)
def test_a_weight_that_is_read_as_a_tensor_refuses_in_a_sentence(read: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(40, 24))
    fv.quantize(model, [torch.randn(8, 40)], progress=False)
    with pytest.raises(fv.FoveateError, match="on planes"):
        read(model[0].weight)
    assert not hasattr(model[0].weight, "data")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model[0].weight.nothing  # noqa: B018
