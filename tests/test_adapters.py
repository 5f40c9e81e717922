"""peft's adapters on planes, and planes beneath peft's adapters."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.nn.modules import PlaneLinear
from foveate.nn.plane_module import PlaneModule
from foveate.nn.registry import registry_of
from tiny import llama, quantized_llama, tokens

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what peft says when it is imported
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

from foveate.adapters import for_planes

# peft reads a name that newer releases of transformers have deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def _config(**changes: Any) -> Any:
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8, **changes}
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings)


def _adapted(**changes: Any) -> tuple[Any, Any]:
    model, _ = quantized_llama()
    return model, peft.get_peft_model(model, for_planes(_config(**changes), model))


def _trained(adapted: nn.Module, steps: int = 12) -> list[float]:
    batch = tokens(seed=3)[0]
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tokens(seed=5)[0]).logits
    return found


def test_training_lowers_the_loss_and_leaves_planes_alone() -> None:
    model, adapted = _adapted()
    before = _logits(model)
    planes = [t.clone() for w in registry_of(model).weights.values() for t in w.buffers()]
    assert torch.equal(_logits(adapted), before)  # B begins at nothing
    losses = _trained(adapted.train())
    assert losses[-1] < losses[0] - 0.2
    assert all(
        torch.equal(a, b)
        for a, b in zip(planes, (t for w in registry_of(model).weights.values() for t in w.buffers()), strict=True)
    )
    with adapted.disable_adapter():
        assert torch.equal(_logits(adapted.eval()), before)


def test_gradients_are_those_of_the_dense_weights() -> None:
    model, adapted = _adapted(lora_dropout=0.0)
    fv.apply(model, fv.profile_of(model).uniform(8, 32))
    generator = torch.Generator().manual_seed(0)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.1, generator=generator)
    plain = copy.deepcopy(adapted)
    fv.dequantize(plain)
    batch = tokens(seed=3)[0]
    for one in (adapted, plain):
        one(**batch, labels=batch["input_ids"]).loss.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if "lora_" in name}
    found = {name: p.grad for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(found) == len(wanted) == 12
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-6), name


def test_a_folder_and_an_adapter_give_the_same_outputs_again(tmp_path: Path) -> None:
    model, _ = quantized_llama()
    fv.save(model, tmp_path / "base")
    adapted = peft.get_peft_model(model, for_planes(_config(), model))
    _trained(adapted.train(), steps=2)
    expected = _logits(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter")
    base = fv.load(tmp_path / "base")
    config = for_planes(peft.PeftConfig.from_pretrained(tmp_path / "adapter"), base)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config).eval()
    assert torch.equal(_logits(again), expected)


def test_levels_change_beneath_adapters() -> None:
    model, adapted = _adapted()
    profile = fv.profile_of(adapted)
    high = _logits(adapted)
    fv.apply(adapted, profile.uniform(2))
    assert not torch.equal(_logits(adapted), high)
    fv.apply(adapted, profile.uniform(8))
    assert torch.equal(_logits(adapted), high)
    assert model is not adapted


def test_merging_is_refused_until_the_model_is_plain() -> None:
    model, adapted = _adapted()
    _trained(adapted.train(), steps=2)
    adapted.eval()
    fv.apply(model, fv.profile_of(model).uniform(6, 32))
    expected = _logits(adapted)
    for safe in (False, True):
        with pytest.raises(fv.FoveateError, match=r"foveate.dequantize\(model\)"):
            adapted.merge_and_unload(safe_merge=safe)
    assert torch.equal(_logits(adapted), expected)
    fv.dequantize(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.allclose(_logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_saving_with_adapters_around_layers_is_refused(tmp_path: Path) -> None:
    model, adapted = _adapted()
    expected = _logits(model)
    with pytest.raises(fv.CheckpointError, match=r"q_proj is LoraOnPlanes now, .* save adapters by themselves"):
        fv.save(adapted, tmp_path / "both")
    assert not (tmp_path / "both" / "foveate.json").exists()
    plain = adapted.unload()
    fv.save(plain, tmp_path / "base")
    loaded = fv.load(tmp_path / "base")
    fv.unfuse(loaded)  # as the model was while it had adapters
    assert torch.equal(_logits(loaded), expected)


def _with_adapters_first() -> Any:
    model = peft.get_peft_model(llama(), _config())
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05, generator=generator)
    return model.eval()


def test_adapters_that_are_there_first_stay_float(tmp_path: Path) -> None:
    adapted = _with_adapters_first()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name}
    profile = fv.quantize(adapted, tokens(), progress=False)
    after = dict(adapted.named_parameters())
    assert before
    for name, value in before.items():
        assert torch.equal(after[name], value)
        assert after[name].requires_grad
    assert not any("lora" in site.name for site in profile.sites)
    assert any(site.name.endswith("layers.0.self_attn.q_proj.base_layer:weight") for site in profile.sites)
    # q, k and v still multiply in one call, two of them inside adapters
    attention = adapted.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.base_layer.fused_group is attention.k_proj.fused_group is not None
    losses = _trained(adapted.train())
    assert losses[-1] < losses[0]
    expected = _logits(adapted.eval())
    fv.save(adapted, tmp_path / "model")
    with pytest.raises(fv.CheckpointError, match="give the module to fill"):
        fv.load(tmp_path / "model")
    again = fv.load(tmp_path / "model", model=_with_adapters_first())
    assert torch.equal(_logits(again), expected)
    with pytest.raises(fv.FoveateError, match=r"weight.data was asked"):
        adapted.merge_and_unload()
    fv.dequantize(adapted)
    assert not any(isinstance(m, PlaneModule) for m in adapted.modules())
    adapted.merge_and_unload()


def test_modules_to_save_stay_float() -> None:
    adapted = peft.get_peft_model(llama(), _config(modules_to_save=["lm_head"]))
    fv.quantize(adapted, tokens(), progress=False)
    head = adapted.base_model.model.lm_head
    assert isinstance(head.modules_to_save["default"], nn.Linear)
    assert isinstance(head.original_module, PlaneLinear)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_modules": "all-linear"}, "name the layers"),
        ({"modules_to_save": ["lm_head"]}, "lm_head, which is on planes"),
        ({"init_lora_weights": "pissa"}, "'pissa'.* needs the dense weight"),
        ({"use_dora": True}, "DoraLinearVariant needs the dense weight"),
    ],
)
def test_what_planes_cannot_do_is_refused_in_a_sentence(changes: dict[str, Any], says: str) -> None:
    model, _ = quantized_llama()
    with pytest.raises(fv.FoveateError, match=says):
        peft.get_peft_model(model, for_planes(_config(**changes), model))


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(fv.FoveateError, match="not quantized"):
        for_planes(_config(), llama())
