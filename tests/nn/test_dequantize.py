"""The way back: plain modules with the weights that were read, under the names that they had."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import FAMILIES
from torch import Tensor, nn

import foveate as fv
from foveate.calibrate import dequantize as way_back
from foveate.nn.plane_module import PlaneModule
from foveate.nn.weight import PlaneWeight
from tiny import TRANSFORMER, generator, llama, mlp, rows, tokens


def _everything() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(40, 32, padding_idx=0),
        nn.Linear(32, 48, bias=False),
        nn.Unflatten(1, (3, 16)),
        nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(6, 6, 5, groups=6),
        nn.Unflatten(2, (3, 4)),
        nn.Conv2d(6, 8, (3, 2), stride=(1, 2)),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def _ids() -> list[Tensor]:
    return list(torch.randint(0, 40, (32,), generator=generator(1)).chunk(2))


def _is_plain(model: nn.Module, original: nn.Module) -> None:
    assert not any(isinstance(m, PlaneModule | PlaneWeight) for m in model.modules())
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    before, after = original.state_dict(), model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert (after[name].shape, after[name].dtype) == (tensor.shape, tensor.dtype), name
        assert after[name].is_contiguous()
    flags = {name: p.requires_grad for name, p in original.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == [m.training for m in original.modules()]
    with pytest.raises(fv.FoveateError, match="not quantized"):
        fv.current_map(model)


def _at_level_32(model: nn.Module, profile: fv.Profile, level: int = 4) -> None:
    fv.apply(model, profile.uniform(level, 32))


@pytest.mark.parametrize("level", [0, 3, 8])
def test_every_kind_of_layer_is_what_it_was(level: int) -> None:
    model = _everything()
    model[1].weight.requires_grad_(False)
    model[4].eval()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, _ids(), progress=False)
    _at_level_32(model, profile, level)
    expected = model(_ids()[0]).detach()
    read = {name: w.dequantize() for name, w in fv.nn.registry.registry_of(model).weights.items()}
    fv.dequantize(model)
    _is_plain(model, original)
    assert torch.allclose(model(_ids()[0]), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for name, dense in read.items():  # to the bit: a weight is what was read
        assert torch.equal(model.get_submodule(name.removesuffix(":weight")).weight.flatten(1), dense), name
    assert str(model) == str(original)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def _bert(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**TRANSFORMER)).eval().to(dtype)


def _gemma() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**TRANSFORMER, head_dim=8)).eval()


MODELS = {
    "gemma 2, whose embedding has a forward of its own": _gemma,
    "llama": llama,
    "llama in bfloat16, tied": lambda: llama(tie_word_embeddings=True).bfloat16(),
    "gpt2": _gpt2,
    "bert": _bert,
    "bert in bfloat16": lambda: _bert(torch.bfloat16),
    "mixtral": FAMILIES["Mixtral"],
    "gpt-oss": FAMILIES["gpt-oss: [E, in, out] with biases"],
    "llama 4": FAMILIES["Llama 4: every expert its rows"],
}


def _ties(model: nn.Module) -> list[list[str]]:
    """Names that are one parameter."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


@pytest.mark.parametrize("loaded", [False, True], ids=["live", "loaded"])
@pytest.mark.parametrize("name", MODELS)
def test_a_transformers_model_is_saved_and_read_by_transformers(name: str, loaded: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = MODELS[name]()
    original = copy.deepcopy(model)
    profile = fv.quantize(model, tokens(), progress=False)
    _at_level_32(model, profile)
    if loaded:
        fv.save(model, tmp_path / "planes")
        model = fv.load(tmp_path / "planes")
    batch = tokens(seed=5)[0]
    with torch.no_grad():
        expected = model(**batch).logits.float()
        fv.dequantize(model)
        _is_plain(model, original)
        assert _ties(model) == _ties(original)
        got = model(**batch).logits.float()
        step = float(torch.finfo(original.dtype).eps) * float(expected.abs().max())
        assert torch.allclose(got, expected, rtol=0, atol=40 * step)
        model.save_pretrained(tmp_path / "plain")
        again = type(model).from_pretrained(tmp_path / "plain").eval()
        assert torch.allclose(again(**batch).logits.float(), got, rtol=0, atol=40 * step)
    assert again.dtype == original.dtype
    written = again.state_dict()
    assert all(torch.equal(written[key], tensor) for key, tensor in model.state_dict().items())


def test_what_was_trained_since_is_kept() -> None:
    pytest.importorskip("transformers")
    model = _bert(torch.bfloat16)
    fv.quantize(model, tokens(), progress=False)
    decoder = model.cls.predictions.decoder
    with torch.no_grad():
        decoder.bias.add_(1.0)
    fv.dequantize(model)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert float(model.cls.predictions.bias.detach().min()) >= 1.0
    assert model.cls.predictions.bias.dtype == torch.bfloat16


def test_it_can_be_quantized_again() -> None:
    model = mlp()
    profile = fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    fv.apply(model, profile.uniform(4))
    fv.dequantize(model)
    read = model[0].weight.detach().clone()
    fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    # 16 values a group are on any grid of 8 bits, nearly
    assert float((model[0].weight.dequantize() - read).norm() / read.norm()) < 0.01


def test_hooks_stay_and_their_handles_remove_them() -> None:
    model, calls = mlp(), []
    first = model[0].register_forward_hook(lambda *_: calls.append("before"))
    fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    second = model[2].register_forward_pre_hook(lambda *_: calls.append("between"))
    fv.dequantize(model)
    calls.clear()
    model(rows()[0])
    assert calls == ["before", "between"]
    first.remove()
    second.remove()
    model(rows()[0])
    assert calls == ["before", "between"]


def test_hooks_on_a_stack_of_experts_run_on_planes_and_after() -> None:
    pytest.importorskip("transformers")
    model, calls = FAMILIES["Mixtral"](), []
    handle = model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: calls.append("experts"))
    fv.quantize(model, tokens(), progress=False)
    for _ in range(2):
        calls.clear()
        model(**tokens()[0])
        assert calls == ["experts"]
        if any(isinstance(m, PlaneModule) for m in model.modules()):
            fv.dequantize(model)
    handle.remove()
    model(**tokens()[0])
    assert calls == ["experts"]


def test_one_module_under_two_names_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(40, 40)
            self.second = self.first
            self.third = nn.Linear(40, 40, bias=False)
            self.third.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    model = Twice()
    fv.quantize(model, [torch.randn(8, 40)], progress=False)
    fv.dequantize(model)
    assert model.first is model.second
    assert model.third.weight is model.first.weight
    assert len(list(model.parameters())) == 2


def test_some_experts_that_were_skipped_keep_their_values() -> None:
    pytest.importorskip("transformers")
    model = FAMILIES["Mixtral"]()
    original = copy.deepcopy(model)
    fv.quantize(model, tokens(), skip=("model.layers.0.mlp.experts.0.*",), progress=False)
    fv.dequantize(model)
    _is_plain(model, original)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    kept = original.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(stack[0], kept[0])
    assert not torch.equal(stack[1], kept[1])


def test_inside_a_wrapper() -> None:
    inner = mlp()
    fv.quantize(inner, rows(), objective=fv.Logits(), progress=False)
    outer = nn.Sequential(inner, nn.Softmax(-1))
    fv.dequantize(outer)
    assert isinstance(inner[0], nn.Linear)


@pytest.mark.parametrize("at", [1, 3])
def test_a_failure_leaves_the_model_on_its_planes(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _everything()
    profile = fv.quantize(model, _ids(), progress=False)
    expected = model(_ids()[0])
    calls = []

    def failing(module: PlaneModule) -> Tensor:
        calls.append(module)
        if len(calls) > at:
            raise RuntimeError("no memory")
        return true(module)

    true = way_back._as_kept
    monkeypatch.setattr(way_back, "_as_kept", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        fv.dequantize(model)
    assert torch.equal(model(_ids()[0]), expected)
    fv.apply(model, profile.uniform(3))
    monkeypatch.undo()
    fv.dequantize(model)


def test_weights_that_do_not_fit_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    fv.quantize(model, rows(), objective=fv.Logits(), progress=False)
    monkeypatch.setattr(way_back, "free_memory", lambda: 10_000)
    with pytest.raises(fv.BudgetError, match=r"take .* beside the planes, and 9.77 KiB are free"):
        fv.dequantize(model)
    assert isinstance(model[0], PlaneModule)


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(fv.FoveateError, match="not quantized"):
        fv.dequantize(mlp())
