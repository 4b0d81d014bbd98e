"""The examples, run as a user runs them, on a small stand-in for Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import featherweight as fw
from featherweight.ledger import Ledger

EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion_mnist"
IMAGES = {"train": 128, "t10k": 60}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files of Fashion-MNIST, of a few images of coarse noise."""
    folder = tmp_path_factory.mktemp("fashion-mnist")
    random = np.random.default_rng(0)
    for split, count in IMAGES.items():
        images = np.kron(random.integers(0, 256, (count, 7, 7)), np.ones((4, 4))).astype(np.uint8)
        labels = random.integers(0, 10, count).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example's folder, whose modules can be imported; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(EXAMPLE)
    yield EXAMPLE
    for file in EXAMPLE.glob("*.py"):
        sys.modules.pop(file.stem, None)


def run(script: str, *arguments: str | Path, data: Path) -> str:
    """What a script of the example prints; it must not print anything else, nor fail."""
    done = subprocess.run(
        [sys.executable, EXAMPLE / script, *arguments],
        env={**os.environ, "FASHION_MNIST": str(data), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_leaves_what_it_promises(stand_in: Path, tmp_path: Path, example: Path) -> None:
    printed = run("demo.py", "--out", tmp_path / "out", data=stand_in)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.fw", "model.onnx", "ledger.json", "report.html"
    }  # fmt: skip
    ledger = Ledger.load(tmp_path / "out" / "ledger.json")
    kept = ledger.after.total.macs / ledger.before.total.macs
    assert 0.49 < kept <= 0.5
    assert printed.startswith("ResNet: 0.50 of the MACs")
    for told in (
        "parameters",
        "MACs",
        "stored bytes",
        "file model.fw",
        "latency, onnxruntime, batch 1, 1 thread",
        "group3.1.conv2",
    ):
        assert re.search(rf"^ *{re.escape(told)} ", printed, re.MULTILINE), told
    assert "Data: Fashion-MNIST. Written: " in printed

    (check,) = ledger.checks
    assert check.difference < 1e-4
    assert check.score == pytest.approx(ledger.after.score, abs=0.01)
    assert {timing.runtime for timing in ledger.timings} == {"torch", "onnxruntime"}
    assert ledger.steps[0].left  # the layers that stay are told, with the reason

    from network import resnet

    again = fw.load(tmp_path / "out" / "model.fw", into=resnet(14))
    assert sum(p.numel() for p in again.model.parameters()) == ledger.after.total.params


def test_the_training_makes_a_file_that_the_network_loads(stand_in: Path, tmp_path: Path, example: Path) -> None:
    made = tmp_path / "made.safetensors"
    printed = run("train.py", "--epochs", "1", "--out", made, data=stand_in)
    assert re.search(rf"1 steps in .*\nmade.safetensors: {made.stat().st_size:,} bytes, .*% of 60 test images", printed)
    with safe_open(made, framework="pt") as file:
        assert file.metadata()["data"] == "Fashion-MNIST"
    from network import load_network

    network = load_network(made)
    assert not network.training
    with torch.no_grad():
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_shipped_network_is_the_one_described(example: Path) -> None:
    from network import load_network

    network = load_network()
    described = (example / "README.md").read_text(encoding="utf-8")
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in described
    assert sum(t.isfinite().all().item() for t in network.state_dict().values()) == len(network.state_dict())


def test_the_data_says_what_is_missing(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data import load

    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"FASHION_MNIST is {tmp_path}, but not all of Fashion-MNIST's four"):
        load("train")
    with pytest.raises(ValueError, match="the splits are train and test, not 'tests'"):
        load("tests")


def test_the_data_is_read_as_it_was_written(example: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data import DEVIATION, MEAN, load

    monkeypatch.setenv("FASHION_MNIST", str(stand_in))
    images, labels = load("test")
    assert images.shape == (IMAGES["t10k"], 1, 28, 28)
    with gzip.open(stand_in / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read()[16:], np.uint8)
    np.testing.assert_allclose(images.flatten().numpy() * DEVIATION + MEAN, pixels / 255, atol=1e-6)
    assert set(labels.tolist()) <= set(range(10))


def test_digits_stand_in_where_nothing_can_be_fetched(example: Path) -> None:
    from data import digits

    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1400, 397)
    assert train.images.shape[1:] == (1, 28, 28)
    assert train.name == "scikit-learn digits"
    assert abs(train.images.mean().item()) < 1e-5
    assert train.images.std().item() == pytest.approx(1, abs=1e-4)
