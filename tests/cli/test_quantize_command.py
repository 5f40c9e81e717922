from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import Result

import foveate as fv

FAST = ("--samples", 4, "--length", 32)
Run = Callable[..., Result]


def test_without_a_budget_every_plane_is_kept_and_read(
    run: Run, original: Path, text_file: Path, tmp_path: Path
) -> None:
    result = run("quantize", original, tmp_path / "out", "--data", text_file, *FAST)
    assert result.exit_code == 0, result.output
    assert "calibrating on 4 windows of 32 tokens" in result.stderr
    assert "calibrating" not in result.stdout
    head = fv.read_head(tmp_path / "out")
    assert {head.plan.levels[s.name] for s in head.weight_sites()} == {8}
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["ids.npy", "ids.safetensors"])
def test_token_ids_in_place_of_text(run: Run, original: Path, tmp_path: Path, name: str) -> None:
    ids = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(0))
    if name.endswith("npy"):
        np.save(tmp_path / name, ids.numpy().astype("uint16"))
    else:
        save_file({"tokens": ids.int()}, tmp_path / name)
    result = run("quantize", original, tmp_path / "out", "--tokens", tmp_path / name, *FAST, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["samples"] == 4 * 32


def test_a_budget_is_allocated_verified_and_kept(run: Run, original: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "--data",
        text_file,
        "--samples",
        8,
        "--length",
        32,
        "--bytes",
        "90KiB",
        "--keep-map",
        "--resume",
        "--json",
    )
    result = run("quantize", original, out, *words)
    assert result.exit_code == 0, result.output
    assert "holding out 1 window of 32 tokens for verification" in result.stderr
    found = json.loads(result.stdout)
    assert found["verification"]["samples"] == 32
    assert found["verification"]["reference"] == "the original model"
    assert 0.99 * 90 * 1024 < found["map"]["bytes_resident"] <= 90 * 1024
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # no resume file is left
    refused = run("eval", out, "--data", text_file, *FAST, "--levels", "8")
    assert refused.exit_code == 2
    assert "bits only" in refused.stderr
    allowed = run("eval", out, "--data", text_file, *FAST, "--json")
    assert allowed.exit_code == 0, allowed.output
    assert [m["label"] for m in json.loads(allowed.stdout)["maps"]][-2:] == ["default map", "every plane"]


def test_a_budget_of_loss_is_measured_and_kept(run: Run, original: Path, text_file: Path, tmp_path: Path) -> None:
    words = ("--data", text_file, "--samples", 8, "--length", 32, "--loss", 0.05, "--check")
    result = run("quantize", original, tmp_path / "out", *words, "--json")
    assert result.exit_code in (0, 1), result.output
    found = json.loads(result.stdout)["verification"]
    assert found["within"]
    assert found["divergence"] < found["bound"] <= found["limit"] == 0.05
    assert "measured over predicted loss" in result.stderr
    assert fv.read_head(tmp_path / "out").plan.bits == pytest.approx(json.loads(result.stdout)["map"]["bits"])
    again = run("quantize", original, tmp_path / "out", *words, "--force")
    assert "with twice the standard error, within it" in " ".join(again.stdout.split())
    said = run("allocate", tmp_path / "out", "--loss", 0.05, "--dry-run")
    assert "foveate eval measures" in " ".join(said.stdout.split())


def test_a_model_that_is_there_is_replaced_only_if_told(
    run: Run, original: Path, folder: Path, text_file: Path
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    result = run("quantize", original, folder, "--data", text_file, *FAST)
    assert result.exit_code == 2
    assert result.stderr == f"error: {folder} holds a model already: give another folder, or --force to replace it\n"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    result = run("quantize", original, folder, "--data", text_file, *FAST, "--force", "--bits", 99)
    assert result.exit_code == 0, result.output
    assert "a budget of 99 bits is more than every weight at 8 bits takes" in result.stderr
    assert (folder / "foveate.json").read_bytes() != before["foveate.json"]


def test_memory_that_is_too_little(run: Run, original: Path, text_file: Path, tmp_path: Path) -> None:
    result = run("quantize", original, tmp_path / "out", "--data", text_file, *FAST, "--memory", "1MiB")
    assert result.exit_code == 2
    assert "memory (=1.00 MiB) is too little" in result.stderr
    assert not (tmp_path / "out").exists()


def test_skip_leaves_a_module(run: Run, original: Path, text_file: Path, tmp_path: Path) -> None:
    result = run("quantize", original, tmp_path / "out", "--data", text_file, *FAST, "--skip", "lm_head", "--group", 64)
    assert result.exit_code == 0, result.output
    sites = fv.read_head(tmp_path / "out").sites
    assert "lm_head:weight" not in {s.name for s in sites}
    assert {s.group for s in sites if s.kind == "weight"} == {64}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --data FILE.txt, or --tokens"),
        (("--data", "{nowhere}"), "there is no file"),
        (("--data", "{text}", "--tokens", "{text}"), "not both"),
        (("--tokens", "{text}"), "neither .npy nor .safetensors"),
        (("--data", "{text}", "--length", "4000"), "more than the 128 positions"),
        (("--data", "{text}", "--group", "48"), "48"),
        (("--data", "{text}", "--keep-map"), "needs a budget"),
        (("--data", "{text}", "--check"), "needs a budget"),
        (("--data", "{text}", "--bits", "4", "--loss", "0.1"), "exactly one of"),
        (("--data", "{text}", "--bytes", "much"), "not a number of bytes"),
        (("--data", "{text}", "--memory", "much"), "not a number of bytes"),
        (("--data", "{text}", "--bits", "-1"), "positive"),
        (("--data", "{text}", "--samples", "none"), "--samples"),
        (("--data", "{text}", "--length", "32", "--skip", "nothing"), "matches none"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    run: Run, original: Path, text_file: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    filled = [w.format(text=text_file, nowhere=tmp_path / "nowhere") for w in words]
    result = run("quantize", original, tmp_path / "out", *filled)
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.iterdir())


def test_a_classifier_keeps_its_head(run: Run, text_file: Path, original: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = tmp_path / "model"
    transformers.BertForSequenceClassification(config).save_pretrained(model)
    transformers.AutoTokenizer.from_pretrained(original).save_pretrained(model)
    result = run("quantize", model, tmp_path / "out", "--data", text_file, "--length", 16, "--samples", 8, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["objective"] == "logits"
    assert type(fv.load(tmp_path / "out")).__name__ == "BertForSequenceClassification"


def test_models_of_other_inputs_are_refused(run: Run, tmp_path: Path) -> None:
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    np.save(tmp_path / "ids.npy", np.zeros((4, 16), dtype=np.int64))
    for model in (
        transformers.T5ForConditionalGeneration(transformers.T5Config(**small)),
        transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, **vision)),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        result = run("quantize", folder, tmp_path / "out", "--tokens", tmp_path / "ids.npy")
        assert result.exit_code == 2
        assert "does not run on token ids alone" in result.stderr


def test_a_budget_that_nothing_meets_says_the_least(run: Run, original: Path, text_file: Path, tmp_path: Path) -> None:
    result = run("quantize", original, tmp_path / "out", "--data", text_file, *FAST, "--bits", 1)
    assert result.exit_code == 2
    assert "least possible is more than" in result.stderr
    assert not list(tmp_path.iterdir())
    small = run("quantize", original, tmp_path / "out", "--data", text_file, *FAST, "--bytes", "1KiB")
    assert small.exit_code == 2
    assert "no map fits in 1.00 KiB: the least is more than" in small.stderr


def test_bad_models_and_targets(run: Run, original: Path, text_file: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    for model, out, message in (
        ("./nowhere", tmp_path / "out", "there is no folder"),
        (tmp_path, tmp_path / "out", "holds no config.json"),
        (original, original, "the model itself"),
        (original, full, "not empty"),
        (original, text_file, "is a file"),
    ):
        result = run("quantize", model, out, "--data", text_file, *FAST)
        assert result.exit_code == 2, (model, out)
        assert message in result.stderr
    assert (full / "thesis.tex").read_text() == "years of work"


def test_a_file_that_is_no_text_or_no_ids(run: Run, original: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "float.npy", np.zeros(64))
    np.save(tmp_path / "large.npy", np.full(64, 256))
    for option, name, message in (
        ("--data", "a.txt", "not text in UTF-8"),
        ("--tokens", "pickle.npy", "cannot be read"),
        ("--tokens", "float.npy", "not token ids"),
        ("--tokens", "large.npy", "holds token 256, and the model knows 0 to 255"),
    ):
        result = run("quantize", original, tmp_path / "out", option, tmp_path / name, *FAST)
        assert result.exit_code == 2, name
        assert message in result.stderr
