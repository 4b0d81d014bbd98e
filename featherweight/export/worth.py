"""What an exported file is worth in its runtime: which kernels it runs in, and how fast beside the original there."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from featherweight.batch import Inputs
from featherweight.cost.latency import Latency, measure, torch_run
from featherweight.errors import ExportError
from featherweight.export import onnx, openvino
from featherweight.export.executorch import ExecuTorchModel
from featherweight.export.fused import in_executorch, in_onnxruntime, in_openvino
from featherweight.export.onnx import OnnxModel
from featherweight.export.openvino import OpenVINOModel
from featherweight.export.program import capture
from featherweight.export.quantized import marked
from featherweight.export.verify import export
from featherweight.ledger import Check
from featherweight.machine import processor

_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "executorch": ("executorch", "torchao"),
}


# After so many seconds of timing one network beside another no further calls are timed.
BESIDE_SECONDS = 10.0


def available() -> tuple[str, ...]:
    """The formats that `measured` knows and whose runtimes are installed."""
    return tuple(name for name, needed in _PACKAGES.items() if all(importlib.util.find_spec(p) for p in needed))


def file_name(format: str) -> str:
    """What a file of that format is called.

    Raises:
        ExportError: kernels cannot be looked at in that format.
    """
    if format not in _PACKAGES:
        raise ExportError(f"{format!r} is no format whose runtime can be asked: there are {', '.join(_PACKAGES)}")
    return {"onnx": "model.onnx", "openvino": "model.xml", "executorch": "model.pte"}[format]


def measured(check: Check, original: nn.Module, path: Path, example: Inputs, repeats: int = 50) -> Check:
    """A check with the kernels of its file, and the times of the file and of the original in the same runtime.

    Args:
        check: of the file.
        original: the model before.
        path: the file.
        example: inputs of one call.
        repeats: timed calls of each.
    """
    inputs = example.on(original)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / file_name(check.format)
        export(original, inputs, check.format, before, dynamic_batch=check.format != "executorch")
        runs: dict[str, Callable[[], object]] = {}
        notes = list(check.notes)
        if check.format == "onnx":
            kernels = in_onnxruntime(path)
            runs["file"], runs["float32"] = (partial(inputs.into, OnnxModel(p)) for p in (path, before))
            notes.append("ONNX Runtime has no kernels in bfloat16 on this processor")
        elif check.format == "executorch":
            kernels = in_executorch(path)
            runs["file"], runs["float32"] = (partial(inputs.into, ExecuTorchModel(p)) for p in (path, before))
        else:
            model = OpenVINOModel(path)
            kernels = in_openvino(model)
            runs["file"], runs["float32"] = partial(inputs.into, model), partial(inputs.into, OpenVINOModel(before))
            if processor().bf16:
                runs["bfloat16"] = partial(inputs.into, OpenVINOModel(before, precision="bf16"))
            else:
                notes.append("this processor does not multiply in bfloat16")
        with torch.no_grad():
            taken = {name: latency.median_ms for name, latency in measure(runs, repeats=repeats).items()}
    for name in ("float32", "bfloat16"):
        if name in taken and taken["file"] >= taken[name]:
            notes.append(f"not faster than the original in {name}: {taken['file']:.3g} ms against {taken[name]:.3g} ms")
    if kernels.left:
        notes.append(f"in floating point: {', '.join(kernels.left)}")
    return replace(
        check,
        integer_operations=kernels.integer,
        operations=kernels.total,
        in_float=kernels.left,
        latency_ms=taken["file"],
        float32_ms=taken["float32"],
        bfloat16_ms=taken.get("bfloat16"),
        notes=tuple(notes),
    )


def beside(original: nn.Module, example: Inputs, runtime: str) -> Callable[[nn.Module], tuple[Latency, Latency]]:
    """A function that times a network in a runtime, in turn with the original there: its latency, and the original's.

    Values do not matter to it: no answers are compared. On one thread it is the processor's time that counts, which on
    a quiet machine is the clock's, and leaves out what others do there meanwhile.

    Args:
        original: what to time beside.
        example: inputs of one call.
        runtime: ``onnx``, ``openvino`` or ``torch``, on as many threads as PyTorch uses.

    Raises:
        ExportError: a network cannot be exported or run there, or the runtime is missing.
    """
    first = _called(original, example, runtime)

    def timed(model: nn.Module) -> tuple[Latency, Latency]:
        runs = {"model": _called(model, example, runtime), "original": first}
        with torch.no_grad():
            clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
            taken = measure(runs, seconds=BESIDE_SECONDS, clock=clock)
        return taken["model"], taken["original"]

    return timed


def _called(model: nn.Module, example: Inputs, runtime: str) -> Callable[[], object]:
    """A call of a model in a runtime, for inputs of the example's shapes."""
    if runtime == "torch":
        return torch_run(model, example)
    inputs = example.on(model)
    plain, marks = marked(model)
    program = capture(plain, inputs, dynamic_batch=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name(runtime)
        if runtime == "onnx":
            onnx.write(program, path, marks=marks)
            return partial(inputs.into, OnnxModel(path))
        openvino.write(program, path, marks=marks)
        return partial(inputs.into, OpenVINOModel(path))
