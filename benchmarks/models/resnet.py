"""CIFAR-10 ResNets of He et al., section 4.2 (https://arxiv.org/abs/1512.03385): 6n+2 layers, option A shortcuts.

Parameter names and normalisation are those of akamaster/pytorch_resnet_cifar10 (BSD-2), so its weights load.

Legend: B images, C channels, H and W sizes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut that has no weights: it skips pixels and pads channels with zeros."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride, self.added = stride, channels_out - channels_in

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_BCHW)))))
        half = self.added // 2
        shortcut = x_BCHW[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, half, self.added - half)))


class ResNet(nn.Module):
    """Three stages of n blocks, 16, 32 and 64 channels wide."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        blocks = (layers - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(Block(32 if i else 16, 32, 1 if i else 2) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(Block(64 if i else 32, 64, 1 if i else 2) for i in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalised images [B, 3, 32, 32] -> logits [B, 10]."""
        x = F.relu(self.bn1(self.conv1(x_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
