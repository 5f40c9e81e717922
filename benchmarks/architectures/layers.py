"""torch's own layers, each in a small model of its own, as families to be tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.architectures.families import Family


class _FirstOutput(nn.Module):
    """A layer whose first output goes on to a linear layer; its other outputs are dropped."""

    def __init__(self, layer: nn.Module, width: int, repeat: int = 1) -> None:
        super().__init__()
        self.layer, self.head, self.repeat = layer, nn.Linear(width, 5), repeat

    def forward(self, x: Tensor) -> Tensor:
        answer = self.layer(*(x,) * self.repeat)
        y: Tensor = self.head(answer[0] if isinstance(answer, tuple) else answer)
        return y


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sequences(seed: int) -> Tensor:
    return torch.randn(6, 10, 32, generator=_random(seed))


def _vectors(seed: int) -> Tensor:
    return torch.randn(16, 32, generator=_random(seed))


def _pictures(seed: int) -> Tensor:
    return torch.randn(6, 3, 12, 12, generator=_random(seed))


def _volumes(seed: int) -> Tensor:
    return torch.randn(6, 3, 6, 6, 6, generator=_random(seed))


def _numbers(seed: int) -> Tensor:
    return torch.randint(0, 60, (16, 6), generator=_random(seed))


def _encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


def _layer(name: str, make: Callable[[], nn.Module], batch: Callable[[int], Any]) -> Family:
    return Family(name=name, kind="torch's own layers", make=make, batch=batch, skeleton=True)


LAYERS: tuple[Family, ...] = (
    _layer("Linear", lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), _vectors),
    _layer(
        "Linear with weight_norm", lambda: nn.Sequential(weight_norm(nn.Linear(32, 64)), nn.Linear(64, 8)), _vectors
    ),
    _layer("Bilinear", lambda: _FirstOutput(nn.Bilinear(32, 32, 24), 24, repeat=2), _vectors),
    _layer("Embedding", lambda: nn.Sequential(nn.Embedding(60, 32), nn.Flatten(), nn.Linear(192, 8)), _numbers),
    _layer("EmbeddingBag", lambda: nn.Sequential(nn.EmbeddingBag(60, 32), nn.Linear(32, 8)), _numbers),
    _layer(
        "Conv2d, BatchNorm2d",
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.Flatten(),
            nn.Linear(1024, 8),
        ),
        _pictures,
    ),
    _layer(
        "Conv1d",
        lambda: nn.Sequential(nn.Conv1d(10, 16, 3, padding="same", dilation=2), nn.Conv1d(16, 8, 5)),
        _sequences,
    ),
    _layer("Conv3d", lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.Flatten(), nn.Linear(512, 8)), _volumes),
    _layer(
        "ConvTranspose2d", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, stride=2)), _pictures
    ),
    _layer(
        "MultiheadAttention", lambda: _FirstOutput(nn.MultiheadAttention(32, 4, batch_first=True), 32, 3), _sequences
    ),
    _layer(
        "TransformerEncoder",
        lambda: nn.Sequential(nn.TransformerEncoder(_encoder_layer(), 2, enable_nested_tensor=False), nn.Linear(32, 8)),
        _sequences,
    ),
    _layer("Transformer", lambda: _FirstOutput(nn.Transformer(32, 4, 1, 1, 64, batch_first=True), 32, 2), _sequences),
    _layer("LSTM", lambda: _FirstOutput(nn.LSTM(32, 32, 2, batch_first=True), 32), _sequences),
    _layer("GRU", lambda: _FirstOutput(nn.GRU(32, 32, batch_first=True), 32), _sequences),
)
