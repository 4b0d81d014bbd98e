"""A small network of ResNet-18's layout on noisy digits: 700k parameters, 8.7M MACs, trained in about a minute.

He et al., 2016, table 1, with widths 16 to 128 on 16×16 inputs; scikit-learn's digits with noise that makes them hard
enough to lose accuracy on. 1,200 images to train on, 297 to choose by, 300 to report on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

CACHE = Path(__file__).resolve().parents[1] / "data" / "benchmarks"
NOISE = 0.6


class Block(nn.Module):
    """Two 3×3 convolutions with batch norms around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) → (n, outputs, h / stride, w / stride)."""
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


class Network(nn.Module):
    """Four stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.conv1 = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(widths[0]), nn.ReLU()
        blocks = []
        for inputs, outputs, stride in zip((16, *widths), widths, (1, 2, 2, 2), strict=False):
            blocks += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.pool, self.flatten, self.classify = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 16, 16) → (n, 10)."""
        x = self.blocks(self.relu1(self.norm1(self.conv1(x))))
        return self.classify(self.flatten(self.pool(x)))


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 16, 16) and labels (n,)."""

    images: Tensor
    labels: Tensor


def data() -> tuple[Split, Split, Split]:
    """Training, selection and test images; the same every time."""
    digits, generator = load_digits(), torch.Generator().manual_seed(0)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False)
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order], torch.tensor(digits.target)[order]
    return tuple(Split(images[a:b], labels[a:b]) for a, b in ((0, 1200), (1200, 1497), (1497, None)))  # type: ignore


def accuracy(model: nn.Module, split: Split) -> float:
    """The share of images classified right."""
    model.eval()
    with torch.no_grad():
        return float((model(split.images).argmax(1) == split.labels).double().mean())


def train(model: nn.Module, split: Split, epochs: int, lr: float, seed: int = 0) -> nn.Module:
    """SGD with momentum and a one-cycle learning rate, in place: the same loop for the base and for all fine-tuning."""
    torch.manual_seed(seed)
    model.train()
    steps = epochs * -(-len(split.images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(split.images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(split.images[batch]), split.labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def base(seed: int = 0) -> Network:
    """The trained network of a seed; trained at the first call, then kept in data/benchmarks."""
    path = CACHE / f"digits-{seed}.pt"
    torch.manual_seed(seed)
    model = Network()
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, data()[0], 12, 0.1, seed)
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval()
