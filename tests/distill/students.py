"""Students, teachers and data that the tests of distillation share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import featherweight as fw


class Net(nn.Module):
    """Two stages of convolutions, the second at half the resolution, and a classifier: (samples, 1, 8, 8) → 3."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.down(x).relu().mean((2, 3))
        return self.head(self.drop(x))


def net(width: int = 4, seed: int = 0, classes: int = 3) -> Net:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Net(width, classes)


def images(samples: int = 48) -> TensorDataset:
    """Noise in which a third is brighter: which third is the class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (samples,), generator=generator)
    x = torch.randn(samples, 1, 9, 8, generator=generator)
    rows = torch.arange(9)[None, None, :, None] // 3 == labels[:, None, None, None]
    return TensorDataset((x + 1.5 * rows)[:, :, :8], labels)


def loader(samples: int = 48) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(images(samples), 12, shuffle=True)


def task(**settings: object) -> fw.Task:
    return fw.Task.from_loaders(loader(), loader(96), **{"lr": 0.05, **settings})


def divergence(student: nn.Module, teacher: nn.Module) -> float:
    """How far the student's distribution is from the teacher's, in evaluation mode."""
    x, _ = images(96).tensors
    training = student.training, teacher.training
    student.eval(), teacher.eval()
    with torch.no_grad():
        far = F.kl_div(student(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean")
    student.train(training[0]), teacher.train(training[1])
    return float(far)
