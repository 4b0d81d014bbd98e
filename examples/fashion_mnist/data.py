"""Fashion-MNIST, 70,000 grey photographs of clothes in 10 classes, or scikit-learn's digits where it cannot be had.

Xiao et al., Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017,
arxiv.org/abs/1708.07747; MIT licence. The files are those of Debian's package `dataset-fashion-mnist` (31 MB).

    python data.py        # fetches them without root, and says what it has got
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FASHION_MNIST = "Fashion-MNIST"
PACKAGE = "dataset-fashion-mnist"
FETCHED = Path(__file__).resolve().parents[2] / "data" / "fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
MEAN, DEVIATION = 0.2860, 0.3530  # of the 60,000 training images' pixels, 0 to 1


@dataclass(frozen=True, eq=False)
class Split:
    """Images (n, 1, 28, 28), float32, standardized; labels (n,), int64, 0 to 9; and the name of the data set."""

    images: Tensor
    labels: Tensor
    name: str

    def __iter__(self) -> Iterator[Tensor]:
        """So that ``images, labels = load("test")``."""
        return iter((self.images, self.labels))

    def __len__(self) -> int:
        return len(self.labels)


def load(split: str) -> Split:
    """The images and labels of a split, ``train`` or ``test``.

    Looks in the folder $FASHION_MNIST, then where Debian's package installs, then in this repository's data folder,
    then fetches the package; where that cannot be done, says so and gives scikit-learn's digits.

    Raises:
        ValueError: no such split.
        FileNotFoundError: $FASHION_MNIST is set, but the files are not there.
    """
    if split not in FILES:
        raise ValueError(f"the splits are train and test, not {split!r}")
    folder = _folder()
    return digits(split) if folder is None else _fashion(split, folder)


def fetch(into: Path = FETCHED) -> Path:
    """Download Debian's package and unpack the data set from it; no root needed, nothing is installed.

    Raises:
        OSError: it cannot be done here; the message says why.
    """
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise OSError(f"this system has no {' and no '.join(missing)}")
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        work = Path(scratch)
        try:
            _run(["apt-get", "download", PACKAGE], work)
        except OSError:  # the system's package lists may be missing or old: read fresh ones into our own folder
            private = ["-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}/cache"]
            for folder in ("lists/partial", "cache/archives/partial"):
                (work / folder).mkdir(parents=True)
            _run(["apt-get", *private, "update"], work)
            _run(["apt-get", *private, "download", PACKAGE], work)
        _run(["dpkg-deb", "-x", str(next(work.glob(f"{PACKAGE}_*.deb"))), "unpacked"], work)
        unpacked = work / "unpacked" / INSTALLED.relative_to("/")
        if not _complete(unpacked):
            raise OSError(f"{PACKAGE} does not hold {[name for pair in FILES.values() for name in pair]}")
        shutil.rmtree(into, ignore_errors=True)
        unpacked.replace(into)
    return into


def digits(split: str) -> Split:
    """scikit-learn's 1,797 hand-written digits, 8×8 enlarged to 28×28: the first 1,400 to train, the rest to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    grey = F.interpolate(grey, size=(28, 28), mode="bilinear", align_corners=False)
    standardized = (grey - grey[:1400].mean()) / grey[:1400].std()
    part = slice(None, 1400) if split == "train" else slice(1400, None)
    return Split(standardized[part], torch.from_numpy(labels).long()[part], "scikit-learn digits")


@cache  # a fetch that failed is not tried, nor reported, again
def _folder() -> Path | None:
    if named := os.environ.get("FASHION_MNIST"):
        if not _complete(Path(named)):
            raise FileNotFoundError(f"FASHION_MNIST is {named}, but not all of Fashion-MNIST's four files are there")
        return Path(named)
    for folder in (INSTALLED, FETCHED):
        if _complete(folder):
            return folder
    print(f"Fetching Fashion-MNIST (Debian's package {PACKAGE}, 31 MB) into {FETCHED}", flush=True)
    try:
        return fetch()
    except OSError as error:
        print(f"Fashion-MNIST cannot be fetched: {error}\nUSING SCIKIT-LEARN'S DIGITS INSTEAD, a far easier data set.")
        return None


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for pair in FILES.values() for name in pair)


def _fashion(split: str, folder: Path) -> Split:
    images, labels = (_read_idx(folder / name) for name in FILES[split])
    grey = torch.from_numpy(images).float().div(255).unsqueeze(1)
    return Split((grey - MEAN) / DEVIATION, torch.from_numpy(labels).long(), FASHION_MNIST)


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's IDX format: 0, 0, type, number of dimensions, the dimensions, the values."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()  # torch wants to own its memory


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"`{' '.join(command)}` took more than ten minutes") from error
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` said: {done.stderr.strip() or done.stdout.strip()}")


if __name__ == "__main__":
    for split in FILES:
        loaded = load(split)
        print(f"{loaded.name}, {split}: {len(loaded):,} images")
