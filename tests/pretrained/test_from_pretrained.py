"""transformers' own `from_pretrained` gives what `foveate.load` gives, or an error: never random weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
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


def _t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=50)
    return transformers.T5ForConditionalGeneration(config).eval()


def _bart() -> nn.Module:
    layers = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("ffn_dim", 48), ("attention_heads", 2))
    }
    config = transformers.BartConfig(d_model=32, vocab_size=50, max_position_embeddings=32, **layers)
    return transformers.BartForConditionalGeneration(config).eval()


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "tied llama": (lambda: llama(tie_word_embeddings=True), transformers.AutoModelForCausalLM),
    "llama": (lambda: llama(tie_word_embeddings=False), transformers.LlamaForCausalLM),
    "mixture": (_mixtral, transformers.AutoModelForCausalLM),
    "gpt2": (_gpt2, transformers.AutoModelForCausalLM),
    "bert": (_bert, transformers.AutoModel),
    "t5": (_t5, transformers.AutoModelForSeq2SeqLM),
    "bart": (_bart, transformers.BartForConditionalGeneration),
}


def _outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**_for(model, batch))[0]
    return output


def _for(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, "decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else batch


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_that_of_load(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, auto = MODELS[name]
    model = make()
    profile = fv.quantize(model, [_for(model, batch) for batch in tokens(8)], progress=False)
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
    fv.dequantize(got)
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


def test_values_keep_the_dtype_they_were_saved_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for saved, asked in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        model = llama().to(saved)
        model.config.dtype = saved
        fv.quantize(model, tokens(), progress=False)
        fv.save(model, tmp_path / str(saved))
        caplog.clear()
        got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(saved), dtype=asked)
        name = str(saved).removeprefix("torch.")
        assert f"values stay {name}, as they were saved; dtype (={asked}) is not taken" in caplog.text
        assert got.config.dtype == got.dtype == saved
        assert torch.equal(
            _outputs(got, tokens(seed=6)[0]), _outputs(fv.load(tmp_path / str(saved)), tokens(seed=6)[0])
        )
        caplog.clear()
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(saved))
        assert "values stay" not in caplog.text


def test_it_loads_under_another_default_dtype(folder: Path) -> None:
    batch = tokens(seed=6)[0]
    wanted = _outputs(fv.load(folder), batch)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = transformers.AutoModelForCausalLM.from_pretrained(folder), fv.load(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(_outputs(model, batch), wanted) for model in found)


def test_nothing_of_transformers_quantizers_is_left_on_it(folder: Path) -> None:
    got, loaded = transformers.AutoModelForCausalLM.from_pretrained(folder), fv.load(folder)

    def marks(model: Any) -> set[str]:
        return {name for name in vars(model) if "quant" in name or name.startswith(("hf_", "_is_hf"))}

    assert marks(got) == marks(loaded)
    assert got.config.to_diff_dict() == loaded.config.to_diff_dict()  # type: ignore[union-attr, operator]
    got.float()


def test_other_models_are_loaded_as_before(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    fv.register_with_transformers()  # a second time
    with pytest.raises(fv.FoveateError, match="quantizes nothing"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FoveateConfig())
    batch = tokens()[0]
    assert torch.equal(
        _outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), batch), _outputs(model, batch)
    )


def test_without_the_quantizer_it_fails_and_gives_no_random_weights(folder: Path, tmp_path: Path) -> None:
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    fv.save(again, tmp_path / "again")
    fv.save(fv.load(tmp_path / "again"), tmp_path / "and again")
    for path in (folder, tmp_path / "again", tmp_path / "and again"):
        program = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "OSError" in done.stderr
        assert "no file named model.safetensors" in done.stderr


def test_another_class_is_refused(folder: Path) -> None:
    with pytest.raises(fv.CheckpointError, match="holds a LlamaForCausalLM, not a LlamaModel"):
        transformers.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("part", ["plane0", "rest", "scales"])
def test_a_damaged_folder_is_refused(part: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    shutil.copytree(folder, path)
    file = next(path.glob(f"foveate-{part}*"))
    for content in (file.read_bytes()[:-3], b""):
        file.write_bytes(content)
        with pytest.raises(fv.CheckpointError, match="out"):
            transformers.AutoModelForCausalLM.from_pretrained(path)
    file.unlink()
    with pytest.raises(fv.CheckpointError, match="out"):
        transformers.AutoModelForCausalLM.from_pretrained(path)
    (path / "foveate.json").unlink()
    with pytest.raises(fv.CheckpointError, match=r"foveate\.json"):
        transformers.AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("rest", [5, "", "model.safetensors", "../other/foveate-rest-0123456789ab.safetensors", None])
def test_a_strangers_configuration_names_no_other_file(rest: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["rest"] = rest
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(fv.CheckpointError, match="is not the name of a file of foveate's"):
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


@pytest.mark.parametrize("within", [".", "quantized"])
def test_a_model_of_the_hub_is_fetched_whole(
    within: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tmp_path / "models--someone--a-model" / "snapshots" / ("0" * 40) / within
    found.mkdir(parents=True)
    for name in ("config.json", next(folder.glob("foveate-rest*")).name):  # transformers has fetched these
        shutil.copy(folder / name, found)
    asked: list[Any] = []

    def fetched(name: str, **keywords: Any) -> None:
        asked.append((name, keywords))
        for file in folder.glob("foveate*"):
            shutil.copy(file, found)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    batch = tokens(seed=6)[0]
    for _ in range(2):  # the second time all is there
        got = transformers.AutoModelForCausalLM.from_pretrained(found)
        assert torch.equal(_outputs(got, batch), _outputs(fv.load(folder), batch))
    pattern = "foveate*" if within == "." else "quantized/foveate*"
    wanted = {"revision": "0" * 40, "cache_dir": tmp_path, "allow_patterns": [pattern]}
    assert asked == [("someone/a-model", wanted)]
    next(found.glob("foveate-plane1*")).unlink()  # as where fetching was interrupted
    transformers.AutoModelForCausalLM.from_pretrained(found)
    assert len(asked) == 2


def test_a_pipeline_writes_what_the_loaded_model_writes(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    write = transformers.pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    wanted: Any = fv.load(folder)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
    ids = wanted.generate(**tokenizer("w5 w9 w11", return_tensors="pt", return_token_type_ids=False), **how)
    written = write("w5 w9 w11", **how)[0]["generated_text"]
    # releases join the prompt and what follows with a blank or without
    assert written.replace(" ", "") == tokenizer.decode(ids[0]).replace(" ", "")
