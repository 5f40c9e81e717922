"""Our own writer of safetensors files: what others read, on whole pages, and never more or less than was said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foveate.errors import FoveateError
from foveate.files import PAGE, Pieces, TensorFile, checksum, write_tensors


def test_others_read_what_was_written_piece_by_piece(tmp_path: Path) -> None:
    whole = torch.arange(1000, dtype=torch.uint8)
    cut = [bytes(whole[i : i + 300].tolist()) for i in range(0, 1000, 300)]
    pieces = Pieces(dtype=torch.uint8, shape=(1000,), pieces=lambda: cut)
    tensors: dict[str, torch.Tensor | Pieces] = {
        "b": pieces,
        "a": torch.randn(3, 5).t(),
        "none": torch.empty(0, 7, dtype=torch.float16),
        "mask": torch.tensor([True, False]),
    }
    seen: dict[str, bytes] = {}

    def note(name: str, piece: memoryview) -> None:
        seen[name] = seen.get(name, b"") + bytes(piece)

    write_tensors(tmp_path / "file.safetensors", tensors, note)
    found = load_file(tmp_path / "file.safetensors")
    expected = {name: whole if name == "b" else t for name, t in tensors.items()}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], t) for name, t in expected.items())  # type: ignore[arg-type]
    assert seen["b"] == bytes(whole.tolist())
    with TensorFile(tmp_path / "file.safetensors") as file:
        assert min(e.begin for e in file.entries.values()) % PAGE == 0
        # wide numbers first: no tensor lies across its own alignment
        assert all(e.begin % e.dtype.itemsize == 0 for e in file.entries.values())
        assert torch.equal(file.read("b", checksum(whole)), whole)
    write_tensors(tmp_path / "empty", {}, note)
    assert load_file(tmp_path / "empty") == {}


def test_pieces_that_are_not_what_was_said(tmp_path: Path) -> None:
    short = Pieces(dtype=torch.uint8, shape=(10,), pieces=lambda: [b"123"])
    with pytest.raises(FoveateError, match="'x' was given 3 bytes, and its shape needs 10"):
        write_tensors(tmp_path / "file", {"x": short}, lambda name, piece: None)
    with pytest.raises(FoveateError, match="is not one that a safetensors file has"):
        Pieces(dtype=torch.complex128, shape=(1,), pieces=list)
    with pytest.raises(FoveateError, match="negative size"):
        Pieces(dtype=torch.uint8, shape=(-1,), pieces=list)
