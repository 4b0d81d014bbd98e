"""Side by side with AIMET's greedy spatial and weight SVD, in one run: same network, same target, same threads.

AIMET 2.42 goes into an environment of its own, for this script only:

    python -m venv peer
    peer/bin/pip install torch==2.13.0 scikit-learn scipy pandas "bokeh<=3.6.3" holoviews hvplot jsonschema \\
        matplotlib onnx onnx_ir onnxscript osqp cvxpy psutil pybind11 PyYAML safetensors tqdm tensorboard Jinja2
    peer/bin/pip install --no-deps torchvision==0.28.0 aimet-torch==2.42.0
    python benchmarks/against_aimet.py --aimet-python peer/bin/python

Without --aimet-python only our rows are printed. AIMET chooses by accuracy on 297 selection images with ten candidates;
we by fewer training images without their labels or a score. Neither sees the 300 test images that are reported on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import digits
import torch
from results import publish
from torch import nn

import featherweight as fw
from featherweight import factorize
from featherweight.batch import Inputs
from featherweight.cost import profile
from featherweight.edits import Replace
from featherweight.forms import LowRank, Separable

HERE = Path(__file__).resolve().parent
SCHEMES = {"spatial SVD": factorize.SpatialSVD, "weight SVD": factorize.SVD}


def ours(scheme: str, target: float, seed: int, samples: int) -> dict[str, Any]:
    """Featherweight's compressed network and what it took."""
    model, (training, selection, _) = digits.base(seed), digits.data()
    task = fw.Task(
        training.images[:1],
        calibration=training.images[:samples].split(128),
        evaluate=lambda network: digits.accuracy(network, selection),
    )
    step = SCHEMES[scheme](budget=fw.Budget(macs=target), ignore=("conv1",), samples=samples)
    wall, cpu = time.perf_counter(), time.process_time()
    small = fw.compress(model, step, task=task)
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return {"model": small.model, "evaluations": small.ledger.steps[0].evaluations, **taken}


def theirs(scheme: str, target: float, seed: int, python: str) -> dict[str, Any]:
    """AIMET's, rebuilt here from its ranks and values."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        name = scheme.lower().replace(" ", "_")
        command = [python, str(HERE / "aimet_peer.py"), name, str(target), str(seed), str(torch.get_num_threads()), out]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True
        )  # it writes files where it runs
        result = json.loads(out.read_text())
        state = torch.load(f"{out}.pt", weights_only=True)
    model = digits.base(seed)
    for layer, rank in result["ranks"].items():
        Replace(layer, Separable(rank) if scheme == "spatial SVD" else LowRank(rank)).apply(model)
        for old, new in ((f"{layer}.0.", f"{layer}.first."), (f"{layer}.1.", f"{layer}.second.")):
            state = {k.replace(old, new) if k.startswith(old) else k: v for k, v in state.items()}
    # AIMET gives the first factor of a layer with a bias a bias of zeros, which adds nothing.
    assert not any(v.any() for k, v in state.items() if k.endswith("first.bias"))
    model.load_state_dict({k: v for k, v in state.items() if not k.endswith("first.bias")})
    return {"model": model.eval(), **{k: result[k] for k in ("evaluations", "wall", "cpu")}}


def judged(result: dict[str, Any], seed: int) -> dict[str, float]:
    """True costs, and accuracy on the test images as it is and after four epochs of fine-tuning."""
    model: nn.Module = result.pop("model")
    training, _, test = digits.data()
    example = Inputs((test.images[:1],))
    whole, small = profile(digits.base(seed), example).total, profile(model, example).total
    raw = digits.accuracy(model, test)
    tuned = digits.accuracy(digits.train(model, training, 4, 0.02, seed), test)
    shares = {"macs": small.macs / whole.macs, "params": small.params / whole.params}
    return {**shares, "raw": 100 * raw, "tuned": 100 * tuned, **result}


def main(python: str | None, seeds: int, threads: int, samples: int, write: bool) -> None:
    """Print a row for each tool, scheme and target: means over the seeds, accuracies with their standard deviation."""
    torch.set_num_threads(threads)
    fw.inspect(digits.base(), digits.data()[0].images[:1])  # what PyTorch loads at the first count is nobody's time
    bases = [100 * digits.accuracy(digits.base(seed), digits.data()[2]) for seed in range(seeds)]
    rows = []
    for scheme in SCHEMES:
        for target in (0.5, 0.3):
            runs = {"Featherweight": [judged(ours(scheme, target, seed, samples), seed) for seed in range(seeds)]}
            if python:
                peer = runs["AIMET"] = [judged(theirs(scheme, target, seed, python), seed) for seed in range(seeds)]
                # It ends below the target; so that accuracies compare, ours once more at what it ends at.
                runs["Featherweight, at AIMET's MACs"] = [
                    judged(ours(scheme, peer[seed]["macs"], seed, samples), seed) for seed in range(seeds)
                ]
            for tool, results in runs.items():
                mean = {key: statistics.mean(r[key] for r in results) for key in results[0]}
                spread = {key: statistics.pstdev(r[key] for r in results) for key in ("raw", "tuned")}
                rows.append(
                    f"| {scheme} | {target} | {tool} | {mean['macs']:.3f} | {mean['params']:.3f} "
                    f"| {mean['raw']:.1f} ± {spread['raw']:.1f} | {mean['tuned']:.1f} ± {spread['tuned']:.1f} "
                    f"| {mean['evaluations']:.0f} | {mean['wall']:.1f} | {mean['cpu']:.1f} |"
                )
    head = (
        "| scheme | asked | tool | MACs | parameters | accuracy % | after 4 epochs % | evaluations | wall s | CPU s |"
    )
    settings = f"{seeds} trainings, {threads} threads, {samples} images for ours"
    base = f"Before: {statistics.mean(bases):.1f} % of the 300 test images; {settings}."
    publish("against_aimet", __doc__ or "", [base, "", head, "|---|---|---|---|---|---|---|---|---|---|", *rows], write)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aimet-python", help="the Python of an environment with aimet-torch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=256, help="calibration images of ours, of 1,200")
    parser.add_argument("--write", action="store_true", help="also keep the table in benchmarks/results")
    options = parser.parse_args()
    main(options.aimet_python, options.seeds, options.threads, options.samples, options.write)
