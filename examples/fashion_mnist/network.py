"""The residual network for small images of He et al. 2016, and the trained one that lies beside this file.

He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2, arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

CHECKPOINT = Path(__file__).with_name("resnet14.safetensors")


class Block(nn.Module):
    """Two 3×3 convolutions around which the input is added; a 1×1 convolution fits it where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A 3×3 convolution, three groups of blocks of 16, 32 and 64 channels, the mean over positions, a linear layer."""

    def __init__(self, depth: int, classes: int = 10, width: int = 16, channels: int = 1) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"the depth is 6n + 2: 8, 14, 20, ...; not {depth}")
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.group1 = _group(blocks, width, width, stride=1)
        self.group2 = _group(blocks, width, 2 * width, stride=2)
        self.group3 = _group(blocks, 2 * width, 4 * width, stride=2)
        self.classify = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channels, height, width) → (batch, classes)
        x = F.relu(self.norm(self.conv(x)))
        x = self.group3(self.group2(self.group1(x)))
        logits: Tensor = self.classify(x.mean((2, 3)))
        return logits


def resnet(depth: int = 14) -> ResNet:
    """An untrained network for grey images in 10 classes; 14 layers have 174,970 parameters."""
    return ResNet(depth)


def load_network(path: Path = CHECKPOINT) -> ResNet:
    """The trained network of 14 layers, in float32 and evaluation mode."""
    network = resnet(14)
    network.load_state_dict(load_file(path))  # half-precision values become the network's own float32
    return network.eval()


def _group(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))
