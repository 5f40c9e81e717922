"""Loading a stranger's folder uses no network, does not hang, and raises only exceptions of foveate."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn

import foveate as fv
from folders import copy_of, rewrite, skeleton, with_
from foveate.errors import CheckpointError
from foveate.files import checksum
from foveate.folder.skeleton import offline
from tiny import quantized_llama


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    fv.save(quantized_llama()[0], folder)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What hosts were asked for."""
    found: list[Any] = []

    def reached(*args: Any, **_: Any) -> Any:
        found.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", reached)
    monkeypatch.setattr(socket.socket, "connect", reached)
    yield found
    assert not found


@pytest.mark.parametrize(
    "name", ["UperNetForSemanticSegmentation", "DPTForDepthEstimation", "DetrForObjectDetection", "TimmBackbone"]
)
@pytest.mark.parametrize("more", [{}, {"use_timm_backbone": False}, {"use_timm_backbone": True, "is_hybrid": True}])
def test_a_backbone_is_never_looked_up(
    llama_folder: Path, tmp_path: Path, asked: list[Any], name: str, more: dict[str, Any]
) -> None:
    folder = copy_of(llama_folder, tmp_path / "model")
    config = {"backbone": "someone/no-such-backbone", "use_pretrained_backbone": True, **more}
    rewrite(folder, with_(model={"transformers": name, "config": config}))
    with pytest.raises(CheckpointError):
        fv.load(folder)


def test_other_threads_reach_the_network_meanwhile() -> None:
    said = []
    with offline():
        thread = threading.Thread(target=lambda: said.append(socket.getaddrinfo("127.0.0.1", 80)))
        thread.start()
        thread.join()
        with pytest.raises(BaseException, match="getaddrinfo"):
            socket.getaddrinfo("127.0.0.1", 80)
    assert said
    assert socket.getaddrinfo("127.0.0.1", 80)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**12},
        {"num_labels": 10**8},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**15},
        {"num_hidden_layers": 10**400},
    ],
)
def test_a_configuration_is_no_larger_than_its_head(llama_folder: Path, tmp_path: Path, change: dict[str, int]) -> None:
    folder = copy_of(llama_folder, tmp_path / "model")

    def changed(data: Any) -> Any:
        data["model"]["config"].update(change)
        return data

    rewrite(folder, changed)
    started = time.process_time()
    if "num_labels" in change:
        fv.load(folder)  # transformers never writes it, and labels are counted by their names
    else:
        with pytest.raises(CheckpointError, match=r"the head can(not)? fill|cannot be used"):
            fv.load(folder)
    assert time.process_time() - started < 2


def test_nesting(llama_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(llama_folder, tmp_path / "model")
    (folder / "foveate.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deep"):
        fv.load(folder)
    (folder / "foveate.json").write_text("[" * 900 + "]" * 900)
    with pytest.raises(CheckpointError, match="nested more than 100 deep"):
        fv.load(folder)


def test_pipes_devices_and_endless_files(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    for i, name in enumerate(["foveate.json", *fv.read_head(saved[0]).files.values()]):
        folder = copy_of(saved[0], tmp_path / str(i))
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match="is not a regular file"):
            fv.load_profile(folder) if "profile" in name else fv.load(folder, model=skeleton())
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match="is not a regular file"):
            fv.load_profile(folder) if "profile" in name else fv.load(folder, model=skeleton())
    folder = copy_of(saved[0], tmp_path / "large")
    os.truncate(folder / "foveate.json", 1 << 40)
    with pytest.raises(CheckpointError, match="at most"):
        fv.load(folder, model=skeleton())


@pytest.mark.parametrize("part", ["plane0", "scales", "rest", "profile"])
def test_files_with_holes_take_no_memory(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, part: str) -> None:
    folder = copy_of(saved[0], tmp_path / "model")
    file = folder / fv.read_head(folder).files[part]
    names = list(load(file.read_bytes()))
    size = 1 << 38
    about = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in names[1:]} | {
        names[0]: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    }
    text = json.dumps(about).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + size)
    with pytest.raises(CheckpointError):
        fv.load_profile(folder) if part == "profile" else fv.load(folder, model=skeleton())


def test_a_link_to_a_regular_file_is_followed(saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    folder.mkdir()
    for file in saved[0].iterdir():
        (folder / file.name).symlink_to(file)
    fv.load(folder, model=skeleton())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_are_finite_and_gains_too(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path, value: float
) -> None:
    for part, end in (("rest", "0.bias"), ("scales", "|gain")):
        folder = copy_of(saved[0], tmp_path / part)
        file = folder / fv.read_head(folder).files[part]
        tensors = load(file.read_bytes())
        name = next(name for name in tensors if name.endswith(end))
        tensors[name].view(-1)[0] = value
        save_file(tensors, file)

        def signed(data: Any, part: str = part, tensors: Any = tensors) -> Any:
            data["files"][part]["sha256"] = {key: checksum(t) for key, t in tensors.items()}
            return data

        rewrite(folder, signed)
        with pytest.raises(CheckpointError, match=r"holds? NaN or Inf"):
            fv.load(folder, model=skeleton())


def test_a_model_that_could_not_be_loaded_is_not_saved(
    saved: tuple[Path, nn.Module, fv.Profile], tmp_path: Path
) -> None:
    model = fv.load(saved[0], model=skeleton())
    with torch.no_grad():
        model[0].bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(CheckpointError, match=r"0\.bias holds NaN or Inf"):
        fv.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_buffers_may_hold_inf(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.register_buffer("mask", torch.full((4,), -torch.inf))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return y

    model = Masked()
    fv.quantize(model, [torch.randn(32, 64)], objective=fv.Logits(), progress=False)
    fv.save(model, tmp_path / "out")
    assert bool(fv.load(tmp_path / "out", model=Masked()).mask.isinf().all())  # type: ignore[operator, union-attr]
