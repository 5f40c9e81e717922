"""A tiny Llama over bytes with a byte-level tokenizer, quantized once for all tests of the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

import foveate as fv
from foveate.cli.app import app

TEXT = "".join(f"def f{i}(x):\n    return x * {i * i} + {i}\n" for i in range(60))
Run = Callable[..., Result]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "code.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run() -> Run:
    """Run the command: `run("inspect", folder)`."""

    def call(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return call


@pytest.fixture(scope="session")
def _quantized(run: Run, original: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    result = run("quantize", original, out, "--data", text_file, "--samples", 8, "--length", 32, "--bits", 5, "--json")
    assert result.exit_code == 0, result.output
    assert fv.read_head(out).plan.bits == pytest.approx(5, rel=0.005)
    return out


@pytest.fixture
def folder(_quantized: Path, tmp_path: Path) -> Path:
    """A quantized folder of the test's own: every plane, and a default map of 5 bits."""
    return shutil.copytree(_quantized, tmp_path / "out")
