"""transformers' own `from_pretrained` gives what `foveate.load` gives, or an error: never random weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import foveate as fv
from foveate.adapters import for_planes
from foveate.pretrained.quantizer import FoveateConfig, FoveateQuantizer
from tiny import llama, quantized_llama, tokens

fv.register_with_transformers()
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 32,
}  # fmt: skip


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    ).eval()


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "tied llama": (lambda: llama(tie_word_embeddings=True), transformers.AutoModelForCausalLM),
    "llama": (lambda: llama(tie_word_embeddings=False), transformers.LlamaForCausalLM),
    "mixture": (_mixtral, transformers.AutoModelForCausalLM),
    "gpt2": (_gpt2, transformers.AutoModelForCausalLM),
    "bert": (_bert, transformers.AutoModel),
}


def _outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**batch)[0]
    return output


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_that_of_load(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, auto = MODELS[name]
    model = make()
    profile = fv.quantize(model, tokens(8), progress=False)
    fv.save(model, tmp_path / "out", keep=None if name == "mixture" else fv.allocate(profile, fv.Budget(bits=4.5)))
    batch = tokens(seed=6)[0]
    wanted: Any = fv.load(tmp_path / "out")
    got, said = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(got) is type(model)
    assert not any(said.values()), said
    assert torch.equal(_outputs(got, batch), _outputs(wanted, batch))
    assert fv.current_map(got) == fv.current_map(wanted)
    assert sorted(got.state_dict()) == sorted(wanted.state_dict())
    assert not got.training
    assert not any(t.is_meta for t in (*got.parameters(), *got.buffers()))
    fv.apply(got, fv.profile_of(got).uniform(2))
    assert not torch.equal(_outputs(got, batch), _outputs(wanted, batch))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose weights are tied, all planes, read at 4 bits."""
    model, profile = quantized_llama(tie_word_embeddings=True)
    fv.apply(model, profile.uniform(4))
    model.generation_config.max_new_tokens = 5
    model.generation_config.do_sample = False
    path = tmp_path_factory.mktemp("pretrained") / "out"
    fv.save(model, path)
    return path


def test_it_generates_and_is_saved_again(folder: Path, tmp_path: Path) -> None:
    wanted: Any = fv.load(folder)
    got = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens(seed=6)[0]["input_ids"][:1]
    mask = torch.ones_like(ids)
    assert torch.equal(got.generate(ids, attention_mask=mask), wanted.generate(ids, attention_mask=mask))
    assert got.lm_head.weight is got.model.embed_tokens.weight
    with pytest.raises(fv.FoveateError, match=r"foveate\.save"):
        got.save_pretrained(tmp_path / "dense")
    fv.save(got, tmp_path / "again")
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    batch = tokens(seed=6)[0]
    assert torch.equal(_outputs(again, batch), _outputs(wanted, batch))
    assert torch.equal(_outputs(fv.load(tmp_path / "again"), batch), _outputs(wanted, batch))


def test_it_becomes_a_plain_model(folder: Path, tmp_path: Path) -> None:
    got = transformers.AutoModelForCausalLM.from_pretrained(folder)
    batch = tokens(seed=6)[0]
    plain: Any = fv.load(folder)
    fv.dequantize(plain)
    got.dequantize()
    assert torch.equal(_outputs(got, batch), _outputs(plain, batch))
    got.save_pretrained(tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(_outputs(dense, batch), _outputs(plain, batch))


def test_adapters_are_trained_on_it(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    got = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = for_planes(peft.LoraConfig(target_modules=["q_proj", "v_proj"]), got)
    adapted = peft.get_peft_model(got, config)
    batch = tokens(seed=6)[0]
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)


def test_values_keep_the_dtype_they_were_saved_in(folder: Path) -> None:
    got = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(_outputs(got, tokens(seed=6)[0]), _outputs(fv.load(folder), tokens(seed=6)[0]))


def test_other_models_are_loaded_as_before(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    fv.register_with_transformers()  # a second time
    batch = tokens()[0]
    assert torch.equal(
        _outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), batch), _outputs(model, batch)
    )


def test_without_the_quantizer_it_fails_and_gives_no_random_weights(folder: Path) -> None:
    program = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert "no file named model.safetensors" in done.stderr


def test_another_class_is_refused(folder: Path) -> None:
    with pytest.raises(fv.CheckpointError, match="holds a LlamaForCausalLM, not a LlamaModel"):
        transformers.AutoModel.from_pretrained(folder)


def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "out")
    plane = next((tmp_path / "out").glob("foveate-plane0*"))
    plane.write_bytes(plane.read_bytes()[:-3])
    with pytest.raises(fv.CheckpointError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "foveate.json").unlink()
    with pytest.raises(fv.CheckpointError, match=r"foveate\.json"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_devices(folder: Path) -> None:
    quantizer = FoveateQuantizer(FoveateConfig())
    for there in (None, "cpu", {"": "cpu"}, torch.device("cpu")):
        assert quantizer.update_device_map(there) == there
    assert quantizer.update_device_map("auto") == {"": torch.device("cpu")}
    for elsewhere in ("cuda", 0, {"model": "cpu", "lm_head": "cuda:1"}, {"model": "disk"}):
        with pytest.raises(fv.DeviceError, match="for the CPU only"):
            quantizer.update_device_map(elsewhere)
    got = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    batch = tokens(seed=6)[0]
    assert torch.equal(_outputs(got, batch), _outputs(fv.load(folder), batch))


def test_a_model_of_the_hub_is_fetched_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def fetched(name: str, **keywords: Any) -> str:
        asked.append((name, keywords))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    found = tmp_path / "snapshot"  # transformers has fetched the configuration and one file
    found.mkdir()
    for name in ("config.json", "generation_config.json", next(folder.glob("foveate-rest*")).name):
        (found / name).write_bytes((folder / name).read_bytes())
    config = transformers.AutoConfig.from_pretrained(found)
    config.name_or_path, config._commit_hash = "someone/model", "abc"
    got = transformers.AutoModelForCausalLM.from_pretrained(found, config=config)
    batch = tokens(seed=6)[0]
    assert torch.equal(_outputs(got, batch), _outputs(fv.load(folder), batch))
    assert asked == [(str(found), {"revision": "abc", "allow_patterns": ["foveate*"]})]
