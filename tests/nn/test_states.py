"""A state_dict of a quantized model is that model, bit for bit, or it is refused and nothing of it is loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from attention import Attention, Counted, X
from torch import Tensor, nn

import foveate as fv
from foveate.nn.modules import PlaneLinear
from foveate.nn.weight import PlaneWeight
from tiny import llama, mlp, quantized_llama, rows, tokens


def _attention(scale: float, **keywords: Any) -> nn.Module:
    """Attention whose weights are all of another size, so that the exponents of their scales are others."""
    made = Attention(bias=True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale).add_(0.01 * torch.randn_like(parameter))
    fv.quantize(made, [X], progress=False, **keywords)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return _attention(1.0)


@pytest.fixture
def target() -> nn.Module:
    return copy.deepcopy(_made())


def _made(made: list[nn.Module] = []) -> nn.Module:  # noqa: B006  once a run
    if not made:
        made.append(_attention(5.0))
    return made[0]


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = dict((*model.named_parameters(), *model.named_buffers()))
    return now.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in now.items())


def test_two_llamas_agree_after_a_state_went_from_one_to_the_other() -> None:
    one, _ = quantized_llama()
    other = llama(seed=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3.0)
    fv.quantize(other, tokens(seed=2), progress=False)
    batch = tokens(seed=4)[0]
    with torch.no_grad():
        expected = one(**batch).logits
        assert not torch.equal(other(**batch).logits, expected)
        forms = [m.value.geometry for m in other.modules() if isinstance(m, PlaneWeight)]
        other.load_state_dict({name: t.clone() for name, t in one.state_dict().items()})
        assert forms != [m.value.geometry for m in other.modules() if isinstance(m, PlaneWeight)]
        for copied in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
            assert torch.equal(copied(**batch).logits, expected)
        fv.apply(one, one_map := fv.current_map(one).with_level("*:weight", 3))
        fv.apply(other, one_map)
        assert torch.equal(other(**batch).logits, one(**batch).logits)


@pytest.mark.parametrize("assign", [False, True])
def test_fused_groups_and_gradients_see_the_loaded_weights(source: nn.Module, target: Any, assign: bool) -> None:
    planes = [m.plane0.data_ptr() for m in target.modules() if isinstance(m, PlaneWeight)]
    target(X)
    assert target.load_state_dict(source.state_dict(), assign=assign) == ([], [])
    with Counted() as counted:
        y_loaded = target(X)
    assert torch.equal(y_loaded, source(X))
    assert counted.products() == 2
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    target(x).sum().backward()
    source(y).sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    assert planes == [m.plane0.data_ptr() for m in target.modules() if isinstance(m, PlaneWeight)]


@pytest.mark.parametrize("part", ["q_proj", "q_proj.weight", "o_proj"])
def test_a_state_of_one_part(source: Any, target: Any, part: str) -> None:
    expected = copy.deepcopy(target)
    expected.load_state_dict({**target.state_dict(), **_under(source, part)})
    target.get_submodule(part).load_state_dict(source.get_submodule(part).state_dict())
    assert torch.equal(target(X), expected(X))
    layer = part.removesuffix(".weight")
    assert torch.equal(target.get_submodule(layer).weight.dequantize(), source.get_submodule(layer).weight.dequantize())


def _under(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if name.startswith(part + ".")}


def test_a_layer_without_a_model(source: Any, target: Any) -> None:
    layer: PlaneLinear = copy.deepcopy(target.q_proj)
    layer.load_state_dict(source.q_proj.state_dict())
    assert torch.equal(layer(X), source.q_proj(X))
    layer.to(torch.bfloat16)
    assert layer.state_dict()["weight.geometry"].tolist() == list(source.q_proj.weight.value.geometry)


def test_a_compiled_model_sees_the_loaded_weights(source: nn.Module, target: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(target, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(X)
        target.load_state_dict(source.state_dict())
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(X), source(X))
    torch._dynamo.reset()


def _at(key: str, change: Any) -> Any:
    return lambda state: {**state, f"o_proj.weight.{key}": change(state[f"o_proj.weight.{key}"])}


REFUSED: dict[str, tuple[Any, str]] = {
    "an older state": (
        lambda state: {k: v for k, v in state.items() if not k.endswith(".geometry")},
        r"the state does not say the geometry of its planes \(q_proj.weight.geometry\).*3 other weights do not fit",
    ),
    "another group": (
        _at("geometry", lambda t: t * torch.tensor([1, 1, 2, 1, 1])),
        "size mismatch, the state has 64 x 48 in groups of",
    ),
    "reach": (_at("geometry", lambda t: t + torch.tensor([0, 0, 0, 4, 0])), r"reach \(=\d\) is not one of 0, 1, 2, 3"),
    "a geometry in int32": (_at("geometry", lambda t: t.int()), r"the geometry is torch.int32 \[5\]"),
    "planes in float": (_at("plane1", lambda t: t.float()), r"plane1 of the state is torch.float32 \[\d+\], not"),
    "a plane cut off": (_at("plane0", lambda t: t[:-64]), r"plane0 of the state is torch.uint8 \[\d+\], not"),
    "levels of no kind": (_at("stored_levels", lambda t: t - 1), "stored_levels has a level that is not one of"),
    "a grid of another shape": (_at("stored_levels", lambda t: t[:1]), "stored_levels of the state is"),
    "offsets of other tiles": (_at("tile_offsets", lambda t: t + 1), "tile_offsets are not those of stored_levels"),
    "gains a row": (_at("gain", lambda t: t.expand(2, 64) if t.shape[1] == 1 else t[:, :1]), "gain of the state is"),
    "no tensor": (_at("gain", lambda t: 3), "gain of the state is no tensor that holds values"),
    "no values": (_at("gain", lambda t: t.to("meta")), "gain of the state is no tensor that holds values"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(
    source: nn.Module, target: Any, what: str, strict: bool
) -> None:
    change, message = REFUSED[what]
    state = change(source.state_dict())
    before, expected = _snapshot(target), target(X)
    with pytest.raises(fv.StateError, match=f"(?s)nothing of the state was loaded: .*{message}"):
        target.load_state_dict(state, strict=strict)
    assert _same(target, before)
    assert torch.equal(target(X), expected)
    with pytest.raises(RuntimeError, match=r"(?s)o_proj"):  # torch's own, which collects what single modules say
        nn.ModuleDict({"o_proj": target.o_proj}).load_state_dict(
            {k: v for k, v in state.items() if k.startswith("o_proj.")}, strict=strict
        )
    assert _same(target.o_proj.weight, {k[14:]: v for k, v in before.items() if k.startswith("o_proj.weight.")})


def test_models_of_other_shapes_are_refused() -> None:
    model, other = mlp(), mlp((70, 20, 10))
    fv.quantize(model, rows(), progress=False)
    fv.quantize(other, rows(), progress=False)
    before = _snapshot(other)
    with pytest.raises(fv.StateError, match=r"0\.weight: size mismatch, the state has 40 x 70 in groups of"):
        other.load_state_dict(model.state_dict())
    assert _same(other, before)


def test_a_part_of_a_weight_is_missing_and_not_loaded(source: nn.Module, target: Any) -> None:
    before = _snapshot(target.o_proj.weight)
    state = {k: v for k, v in source.state_dict().items() if k != "o_proj.weight.scales"}
    found = target.load_state_dict(state, strict=False)
    assert found == (["o_proj.weight.scales"], [])
    assert _same(target.o_proj.weight, before)
    assert torch.equal(target.q_proj(X), source.q_proj(X))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        target.load_state_dict({**source.state_dict(), "q_proj.weight.plane9": torch.empty(0)})


def test_states_that_store_fewer_tiles_or_more(tmp_path: Path) -> None:
    model, other = mlp(), mlp(seed=3)
    profile = fv.quantize(model, rows(), progress=False)
    fv.quantize(other, rows(seed=7), progress=False)
    fv.save(other, tmp_path)
    few = fv.load(tmp_path, keep=4, model=mlp())
    x = rows(seed=5)[0]
    with pytest.raises(fv.StateError, match="stores some tiles up to 4 bits only, and the map in force reads up to 8"):
        model.load_state_dict(few.state_dict())
    fv.apply(model, profile.uniform(3))
    fv.apply(few, profile.uniform(3))
    expected = few(x)
    model.load_state_dict(few.state_dict())
    assert torch.equal(model(x), expected)
    with pytest.raises(fv.PlaneNotResidentError):
        fv.apply(model, profile.uniform(6))
    fv.apply(model, profile.uniform(4))
    model.load_state_dict(other.state_dict())
    fv.apply(model, profile.uniform(8))
    fv.apply(other, profile.uniform(8))
    assert torch.equal(model(x), other(x))
    assert torch.equal(copy.deepcopy(model)(x), other(x))


def test_files_of_safetensors(source: nn.Module, target: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(source.state_dict(), tmp_path / "state.safetensors")
    target.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(target(X), source(X))
