"""`foveate inspect --input`: what one text makes of a quantized model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import Run


def test_where_the_bits_of_a_text_are(run: Run, folder: Path, text_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "input.html"
    words = ("inspect", folder, "--input", "def f(x):", "--data", text_file, "--bits", 5.0, "--page", page)
    found = json.loads(run(*words, "--json").stdout)
    assert found["bits"] == 5.0
    assert "".join(token["text"] for token in found["tokens"]) == "def f(x):"
    assert len({token["bits"] for token in found["tokens"]}) > 1
    assert all(4.5 < token["bits"] < 5.5 for token in found["tokens"])
    layer = found["layers"][0]
    assert layer["reads_high"] == [error > layer["threshold"] for error in layer["estimated"]]
    assert "<h1>def f(x):</h1>" in page.read_text("utf-8")
    table = run(*words).stdout
    assert "tokens: the mean bits of a weight that each read" in table
    assert "self_attn.q_proj" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input", "x"), "give --data FILE.txt"),
        (("--input", "", "--data", "{text}"), "has no tokens"),
        (("--input", "word " * 3000, "--data", "{text}"), "give a shorter one"),
        (("--page", "out.html"), "--page is of --input"),
    ],
)
def test_what_is_refused(run: Run, folder: Path, text_file: Path, words: tuple[str, ...], message: str) -> None:
    result = run("inspect", folder, *(str(text_file) if word == "{text}" else word for word in words))
    assert result.exit_code == 2
    assert message in result.stderr
