"""Whole numbers in ONNX Runtime and OpenVINO: how fast, how small, how true, beside NNCF and ONNX Runtime's quantizer.

Networks laid out as ResNet-18 and MobileNetV2, random weights, 224×224, batch 1, one thread; the demo network on
Fashion-MNIST: static quantization at 8 bits, quantization-aware training at 4 and 2; and EfficientNet-Lite0 (see
photographs.py), weights of 8 and 4 bits. Times are CPU milliseconds of one thread, medians, every file in turn. The
peers go into an environment of their own, for this script only:

    python -m venv peer
    peer/bin/pip install torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 openvino==2026.4.1 nncf==3.4.0
    python benchmarks/quantization.py --peer-python peer/bin/python
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vision
from results import publish
from torch import Tensor, nn

import featherweight as fw
from featherweight import quantize
from featherweight.batch import as_inputs
from featherweight.cost.latency import measure
from featherweight.export.compiled import compiled as compile_model
from featherweight.export.fused import in_onnxruntime, in_openvino
from featherweight.export.onnx import OnnxModel
from featherweight.export.openvino import OpenVINOModel
from featherweight.export.verify import decibels, energies, export
from featherweight.graph.verify import in_double
from featherweight.machine import processor

HERE = Path(__file__).resolve().parent
NNCF_SAMPLES = 300  # its default
SEEN = quantize.GPTQ().samples  # our default, by blocks too
MANY = 2_048  # what weights of 4 bits gain from more pictures


def answers(model: nn.Module, images: Tensor, size: int = 1) -> Tensor:
    """What a model answers, so many images at a time."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(size)])


def agreed(a: Tensor, b: Tensor) -> float:
    """To how many of the samples two networks' answers give the same class, per cent."""
    return 100 * float((a.argmax(1) == b.argmax(1)).double().mean())


def ratio(a: Tensor, b: Tensor) -> float:
    """How true a is to b: signal to noise, dB."""
    return decibels(*energies(a, b)[0])


def random_network(name: str, python: str | None, samples: int, repeats: int) -> list[str]:
    """A row for every file of one network, and how true the simulation is to itself in float64."""
    network, calibration = vision.make(name), vision.images(samples, seed=2)
    fresh, example = vision.images(32, seed=3), vision.images(1, seed=4)
    task = fw.Task(example, calibration=calibration.split(8), evaluate=lambda model: 0.0)
    right = answers(network, fresh, 8)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export(network, as_inputs(example), "onnx", folder / "float.onnx", dynamic_batch=False)
        export(network, as_inputs(example), "openvino", folder / "float.xml", dynamic_batch=False)
        size = (folder / "float.onnx").stat().st_size
        made: dict[str, tuple[Path, float, Tensor | None]] = {
            "float32, ONNX Runtime": (folder / "float.onnx", 0.0, None),
            "float32, OpenVINO": (folder / "float.xml", 0.0, None),
        }
        for target, format, ending in (("onnxruntime-x86", "onnx", "onnx"), ("openvino", "openvino", "xml")):
            begun = time.process_time()
            small = fw.compress(network, quantize.Static(target=target, samples=samples), task=task)
            taken = time.process_time() - begun
            path = folder / f"ours.{ending}"
            small.export(format, path, dynamic_batch=False, tolerance=1.0)  # judged below
            simulated = answers(small.model, fresh, 8)
            double = answers(in_double(small.model), fresh[:8].double(), 8)
            itself = f"{ratio(simulated[:8], double):.1f} dB to itself in float64"
            made[f"Featherweight, {'ONNX Runtime' if ending == 'onnx' else 'OpenVINO'}"] = (path, taken, simulated)
            if target == "onnxruntime-x86":
                compiled = {
                    "float32, torch.compile": compile_model(network, as_inputs(example)),
                    "Featherweight, torch.compile": small.compiled(),
                }
                small.export("openvino", folder / "same.xml", dynamic_batch=False, tolerance=1.0)
                made["Featherweight, the ONNX Runtime model in OpenVINO"] = (folder / "same.xml", taken, simulated)
        if python is not None:
            made |= peers(folder, vision.images(NNCF_SAMPLES, seed=2), samples, python)
        models = {label: _opened(path) for label, (path, _, _) in made.items()}
        inputs = as_inputs(example)
        runs: dict[str, Callable[[], Any]] = {label: partial(inputs.into, model) for label, model in models.items()}
        runs |= {label: partial(inputs.into, model) for label, model in compiled.items()}
        if processor().bf16:
            bf16 = OpenVINOModel(folder / "float.xml", precision="bf16")
            runs["bfloat16, OpenVINO"] = partial(inputs.into, bf16)
        taken_ms = {n: t.median_ms for n, t in measure(runs, repeats, 3, clock=time.process_time).items()}
        for label, (path, seconds, simulated) in made.items():
            model = models[label]
            base = taken_ms["float32, ONNX Runtime" if path.suffix == ".onnx" else "float32, OpenVINO"]
            given = answers(model, fresh)
            stored = path.stat().st_size if path.suffix == ".onnx" else path.with_suffix(".bin").stat().st_size
            kernels = in_onnxruntime(path) if isinstance(model, OnnxModel) else in_openvino(model)
            same = "–"
            if simulated is not None:
                agree = agreed(given, simulated)
                same = f"{ratio(given, simulated):.1f} dB, {agree:.1f} %"
            quantized = not label.startswith("float32")
            cells = [
                label,
                f"{taken_ms[label]:.1f}",
                f"{base / taken_ms[label]:.2f}×" if quantized else "1",
                f"{kernels.integer} of {kernels.total}" if quantized else "–",
                f"{size / stored:.2f}×" if quantized else f"{stored / 1e6:.1f} MB",
                f"{ratio(given, right):.1f}" if quantized else "–",
                same,
                f"{seconds:.0f}" if seconds else "–",
            ]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        for label, model in compiled.items():
            faster = taken_ms["float32, torch.compile"] / taken_ms[label]
            decibels_off = f"{ratio(answers(model, fresh), right):.1f}" if label.startswith("F") else "–"
            shown = f"{faster:.2f}×" if label.startswith("F") else "1"
            rows.append(f"| {name} | {label} | {taken_ms[label]:.1f} | {shown} | – | – | {decibels_off} | – | – |")
        rows.append(f"| {name} | the simulation | | | | | | {itself} | |")
        if "bfloat16, OpenVINO" in taken_ms:
            rows.append(f"| {name} | bfloat16, OpenVINO | {taken_ms['bfloat16, OpenVINO']:.1f} | | | | | | |")
    return rows


def peers(folder: Path, images: Tensor, samples: int, python: str) -> dict[str, tuple[Path, float, None]]:
    """NNCF's file, with all of the images, and ONNX Runtime's, with so many samples of them, and what they took."""
    import json

    np.save(folder / "images.npy", images.numpy())
    reduce = "all" if processor().whole_products else "reduce"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, str(HERE / "quantization_peer.py"), str(folder), reduce, str(samples)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    seconds = json.loads((folder / "peer.json").read_text())
    return {
        "onnxruntime.quantization, ONNX Runtime": (folder / "peer.onnx", seconds["onnxruntime"], None),
        "NNCF, OpenVINO": (folder / "peer.xml", seconds["nncf"], None),
    }


def _opened(path: Path) -> nn.Module:
    return OnnxModel(path, threads=1) if path.suffix == ".onnx" else OpenVINOModel(path, threads=1)


def fashion_network(epochs: float, trained: bool) -> list[str]:
    """A row for every way of quantizing the demo network: accuracy simulated, and of the file in its runtime."""
    import fashion

    network, before = fashion.load_network(), 0.0
    rows = []
    calibration = fashion.calibration(0, 200)
    test, labels = fashion.split("test")
    train_images, train_labels = fashion.split("train")
    before = fashion.accuracy(network)

    def train(model: nn.Module, epochs: float, loss: Any = "cross_entropy") -> None:
        chosen = torch.utils.data.TensorDataset(train_images, train_labels)
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(chosen, 128, shuffle=True, generator=generator)
        fw.fit(model, loader, epochs, loss or "cross_entropy", lr=0.01, mixed_precision=fashion.PRECISION)

    task = fw.Task(
        calibration[0][:1],
        calibration=calibration,
        evaluate=lambda model: fashion.accuracy(model) / 100,
        train=train,
        loss="cross_entropy",
    )
    static, reached = quantize.Static(), partial(quantize.QAT, epochs=epochs)
    untrained: Sequence[tuple[str, Sequence[Any]]] = [
        ("W8A8 static, min-max", (quantize.Static(ranges="min-max", weight_ranges="min-max"),)),
        ("W8A8 static", (static,)),
        ("W4A8 static", (quantize.Static(bits=4),)),
        ("W4A8 static, weights by GPTQ", (quantize.GPTQ(bits=4), static)),
        ("W4A8 static, weights by blocks (BRECQ)", (quantize.BRECQ(bits=4), static)),
        ("W4A4 static", (quantize.Static(bits=4, activation_bits=4),)),
    ]
    in_training: Sequence[tuple[str, Sequence[Any]]] = [
        ("W4A4 trained", (reached(bits=4, activation_bits=4),)),
        ("W4A4 trained, distilled", (reached(bits=4, activation_bits=4, distill=True),)),
        ("W2A2 trained", (reached(bits=2, activation_bits=2),)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for label, steps in in_training if trained else untrained:
            begun = time.process_time()
            small = fw.compress(network, *steps, task=task)
            taken = time.process_time() - begun
            path = Path(folder) / "small.onnx"
            check = small.export("onnx", path)
            simulated, given = answers(small.model.eval(), test, 500), answers(OnnxModel(path), test, 500)
            scores = [100 * float((a.argmax(1) == labels).double().mean()) for a in (simulated, given)]
            agree = agreed(simulated, given)
            rows.append(
                f"| {label} | {scores[0]:.2f} | {before - scores[0]:+.2f} | {scores[1]:.2f} | {agree:.2f} % "
                f"| {ratio(given, simulated):.1f} | {check.bytes / 1e3:.0f} kB | {taken:.0f} |"
            )
            print(rows[-1], flush=True)
    return [f"Before: {before:.2f} %.", "", *rows]


def photographed_network(python: str | None, images: int) -> list[str]:
    """A row for every way of quantizing EfficientNet-Lite0: how often it agrees with float32 and is right."""
    import photographs

    network, named = photographs.load_network(), photographs.named(2 * images, seed=100)
    test = torch.cat([photographs.whole(images, seed=100), photographs.cut_outs(images, seed=100)])
    calibration = photographs.mixed(MANY, seed=0)
    example = calibration[:1]
    exact, exact_named = (answers(network, x, 16) for x in (test, named.images))
    before = 100 * named.right(exact_named.argmax(1))
    rows = []

    def row(label: str, path: Path, seconds: float, simulation: nn.Module | None = None) -> None:
        model = _opened(path)
        given, of_named = answers(model, test), answers(model, named.images)
        same = "–"
        if simulation is not None:
            simulated = answers(simulation, test, 16)
            same = f"{ratio(given, simulated):.1f} dB, {agreed(given, simulated):.1f} %"
        right = 100 * named.right(of_named.argmax(1))
        stored = path.stat().st_size if path.suffix == ".onnx" else path.with_suffix(".bin").stat().st_size
        cells = (
            f"{right:.1f} | {before - right:+.1f} | {agreed(of_named, exact_named):.1f} "
            f"| {agreed(given[:images], exact[:images]):.1f} | {agreed(given[images:], exact[images:]):.1f} "
            f"| {ratio(given, exact):.1f} | {same} | {stored / 1e6:.2f} MB | {seconds:.0f}"
        )
        rows.append(f"| {label} | {cells} |")
        print(rows[-1], flush=True)

    static = quantize.Static()
    # The network's ends are often left at 8 bits.
    ends = {"_conv_stem*": 8, "_fc": 8, "*": 4}
    ways: Sequence[tuple[str, Sequence[Any]]] = [
        ("W8A8 static", (static,)),
        ("W8A8 static, weights by GPTQ", (quantize.GPTQ(bits=8), static)),
        ("W4A8 static", (quantize.Static(bits=4),)),
        ("W4A8 static, weights by GPTQ", (quantize.GPTQ(bits=4), static)),
        (f"the same on {MANY:,} pictures", (quantize.GPTQ(bits=4, samples=MANY), static)),
        ("W4A8 static, weights by blocks (BRECQ)", (quantize.BRECQ(bits=4), static)),
        ("the same, first and last layer W8", (quantize.BRECQ(bits=ends), static)),
    ]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export(network, as_inputs(example), "onnx", folder / "float.onnx", dynamic_batch=False)
        if python is not None:
            for label, (path, taken, _) in peers(folder, calibration[:NNCF_SAMPLES], static.samples, python).items():
                row(label, path, taken)
        for label, steps in ways:
            needed = calibration[: max(step.samples for step in steps)]
            begun = time.process_time()
            small = fw.compress(network, *steps, task=fw.Task(example, calibration=needed.split(16)))
            taken = time.process_time() - begun
            path = folder / "ours.onnx"
            small.export("onnx", path, dynamic_batch=False, tolerance=10.0)  # judged here
            row(label, path, taken, small.model.eval())
    return [f"{before:.1f}", *rows]


def integer_instructions() -> str:
    """What this processor multiplies whole numbers with."""
    for flag, name in (("amx_int8", "with AMX"), ("avx512_vnni", "with VNNI"), ("avx_vnni", "with VNNI")):
        if flag in processor().instructions:
            return name
    return "without VNNI"


def sizes(samples: int) -> list[str]:
    """A row for every file of the networks with random weights: its bytes, and what of it runs on whole numbers."""
    rows = []
    for name in vision.NETWORKS:
        network, calibration = vision.make(name), vision.images(samples, seed=2)
        task = fw.Task(calibration[:1], calibration=calibration.split(8))
        with tempfile.TemporaryDirectory() as place:
            whole = Path(place) / "float.onnx"
            export(network, as_inputs(calibration[:1]), "onnx", whole, dynamic_batch=False)
            for target, format, ending in (("onnxruntime-x86", "onnx", "onnx"), ("openvino", "openvino", "xml")):
                small = fw.compress(network, quantize.Static(target=target, samples=samples), task=task)
                path = Path(place) / f"ours.{ending}"
                small.export(format, path, dynamic_batch=False, tolerance=1.0)
                model = _opened(path)
                kernels = in_onnxruntime(path) if isinstance(model, OnnxModel) else in_openvino(model)
                values = path.with_suffix(".bin") if ending == "xml" else path
                both = values.stat().st_size + (path.stat().st_size if values != path else 0)
                cells = (
                    f"{whole.stat().st_size:,} | {values.stat().st_size:,} | "
                    f"{whole.stat().st_size / values.stat().st_size:.2f}× | {whole.stat().st_size / both:.2f}× | "
                    f"{kernels.integer} of {kernels.total}"
                )
                runtime = "ONNX Runtime" if ending == "onnx" else "OpenVINO"
                rows.append(f"| {name} | {runtime} | {cells} |")
                print(rows[-1], flush=True)
    return rows


def main(
    peer_python: str | None, samples: int, repeats: int, epochs: float, images: int, parts: Sequence[str], write: bool
) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Speeds on one kind of processor say nothing of those on another: each keeps its table.
    titles = {**HEADINGS, "random": f"{HEADINGS['random']} {integer_instructions()}"}
    lines: list[str] = []
    if "random" in parts:
        lines += [
            f"## {titles['random']}, random weights",
            "",
            f"{processor()}. {samples} calibration samples, {NNCF_SAMPLES} for NNCF (defaults); {repeats} timed calls.",
            "",
            "| network | file | ms | against float32 | on whole numbers | size | to float32, dB | to itself | CPU s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name in vision.NETWORKS:
            lines += random_network(name, peer_python, samples, repeats)
            print("\n".join(lines), flush=True)
    if "sizes" in parts:
        what = (
            f"Random weights, {samples} calibration samples. Bytes of the ONNX file; for OpenVINO of the values "
            "(`.bin`), which stand beside a description (`.xml`)."
        )
        lines += [
            "",
            f"## {HEADINGS['sizes']}, 8 bits",
            "",
            what,
            "",
            "| network | for | float32, ONNX | values | smaller | with the description | on whole numbers |",
            "|---|---|---|---|---|---|---|",
            *sizes(samples),
        ]
    for part in ("fashion", "trained"):
        if part not in parts:
            continue
        before, _, *rows = fashion_network(epochs, part == "trained")
        lines += [
            "",
            f"## {HEADINGS[part]}",
            "",
            f"10,000 test images of Fashion-MNIST{f'; {epochs:g} epochs' if part == 'trained' else ''}. {before}",
            "",
            "| how | accuracy % | drop | in ONNX Runtime | same class | dB | file | CPU s |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    if "efficientnet" in parts:
        before, *rows = photographed_network(peer_python, images)
        what = (
            f"The files in their runtimes. {2 * images:,} crops of photographs of what ImageNet has a class for, of "
            f"which float32 names {before} % right, {images} of whole photographs and {images} of cut-outs of all "
            f"kinds, drawings among these; calibrated on other pictures, weights by GPTQ and by blocks on {SEEN} where "
            f"nothing else is said, the rest on {quantize.Static().samples}, NNCF's on {NNCF_SAMPLES}."
        )
        lines += [
            "",
            f"## {HEADINGS['efficientnet']}, trained on ImageNet",
            "",
            what,
            "",
            "| how | right % | drop | same class % | whole | cut-outs | dB | to its simulation | file | CPU s |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    publish("quantization", __doc__ or "", lines, write, parts=[titles[part] for part in parts])


HEADINGS = {
    "random": "ResNet-18 and MobileNetV2",
    "sizes": "How small files of whole numbers are",
    "fashion": "The demo network, calibrated alone",
    "trained": "The demo network, trained on the grids",
    "efficientnet": "EfficientNet-Lite0",
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="an environment with nncf and onnxruntime")
    parser.add_argument("--samples", type=int, default=quantize.Static().samples)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--images", type=int, default=500, help="photographs to judge EfficientNet-Lite0 on")
    parser.add_argument("--parts", nargs="+", choices=tuple(HEADINGS), default=tuple(HEADINGS))
    parser.add_argument("--write", action="store_true", help="also keep the tables in benchmarks/results")
    main(**vars(parser.parse_args()))
