"""Makes resnet14.safetensors, the trained network that the examples start from.

    python examples/fashion_mnist/train.py

Ten epochs with random shifts and flips, a linear one-cycle schedule and label smoothing, in bfloat16 and channels-last
memory (twice as fast as float32 on a processor that knows bfloat16).
"""

from __future__ import annotations

import argparse
import os
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from data import Split, load
from network import CHECKPOINT, load_network, resnet
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from featherweight.train.fit import evaluate_loader, fit

Batch = tuple[Tensor, Tensor]


class Photos(Dataset[Batch]):
    """The images of a split, fetched a whole batch at a time."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.images[indices], self.labels[indices]


def augment(batch: Batch) -> Batch:
    """Shift every image by up to 2 pixels each way, and mirror every other one."""
    images, labels = batch
    count, _, height, width = images.shape
    padded = F.pad(images, (2, 2, 2, 2), value=images.min().item())  # black, where the clothes lie
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (count, 1, 5, 5, height, width), a view
    down, right = torch.randint(5, (2, count))
    images = windows[torch.arange(count), :, down, right]
    mirrored = torch.rand(count, 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    return images.contiguous(memory_format=torch.channels_last), labels


def smoothed(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with a twentieth of the target spread over all classes."""
    return F.cross_entropy(outputs, target, label_smoothing=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="a folder to save to every epoch, and to resume from")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    settings = parser.parse_args()

    train, test = load("train"), load("test")
    if train.name != "Fashion-MNIST":
        raise SystemExit(f"not training on {train.name}: the file made here is to be of Fashion-MNIST")
    torch.manual_seed(settings.seed)
    network = resnet(14).to(memory_format=torch.channels_last)
    history = fit(
        network,
        DataLoader(Photos(train), batch_size=128, shuffle=True, drop_last=True, collate_fn=augment),
        epochs=settings.epochs,
        loss=smoothed,
        lr=0.1,
        mixed_precision="bf16",
        seed=settings.seed,
        checkpoint=settings.checkpoint,
    )

    record = {"data": train.name, "epochs": f"{settings.epochs:g}", "date": date.today().isoformat()}
    halved = {name: v.half() if v.is_floating_point() else v for name, v in network.state_dict().items()}
    save_file({name: v.contiguous() for name, v in halved.items()}, settings.out, metadata=record)
    accuracy = evaluate_loader(load_network(settings.out), DataLoader(Photos(test), 500, collate_fn=tuple))
    print(f"losses per epoch: {', '.join(f'{loss:.4f}' for loss in history.losses)}")
    print(f"{history.steps} steps in {history.seconds:.0f} s on {os.cpu_count()} cores, {torch.get_num_threads()} used")
    print(
        f"{settings.out.name}: {settings.out.stat().st_size:,} bytes, {accuracy:.2%} of {len(test):,} test images right"
    )


if __name__ == "__main__":
    main()
