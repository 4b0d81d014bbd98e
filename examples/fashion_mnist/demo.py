"""The main job: halve the MACs of a trained network, and prove that it still does its job.

Takes a residual network trained on Fashion-MNIST, halves its multiply-accumulates by spatial SVD with ranks chosen from
512 images without labels, confirms the accuracy on the 10,000 test images, saves one file, exports ONNX, runs that file
in ONNX Runtime, prints one table and writes one page. Nothing is fine-tuned.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from data import load
from network import resnet
from project import model, task

import featherweight as fw
from featherweight import factorize
from featherweight.report.table import text


def main(out: Path, macs: float) -> None:
    """Compress to `macs` of the MACs, and leave model.fw, model.onnx, ledger.json and report.html in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    network, job = model(), task()
    small = fw.compress(network, factorize.SpatialSVD(budget=fw.Budget(macs=macs)), task=job)

    small.save(out / "model.fw")
    again = fw.load(out / "model.fw", into=resnet(14))
    images, _ = load("test")
    with torch.no_grad():
        assert torch.equal(again.model(images[:100]), small.model(images[:100])), "the saved file answers differently"

    small.export("onnx", out / "model.onnx", batches=[images[:100]], evaluate=job.evaluate)
    small.time(network)

    small.ledger.save(out / "ledger.json")
    small.report(out / "report.html")
    print(text(small.ledger, width=shutil.get_terminal_size((100, 24)).columns))
    print(f"Data: {load('test').name}. Written: {', '.join(str(file) for file in sorted(out.glob('[lmr]*')))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/fashion_mnist"))
    parser.add_argument("--macs", type=float, default=0.5, help="share of the MACs to keep (default: 0.5)")
    options = parser.parse_args()
    main(options.out, options.macs)
