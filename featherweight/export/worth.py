"""What an exported file is worth in its runtime: which kernels it runs in, and how fast beside the original there."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from featherweight.batch import Inputs
from featherweight.cost.latency import measure
from featherweight.errors import ExportError
from featherweight.export.executorch import ExecuTorchModel
from featherweight.export.fused import in_executorch, in_onnxruntime, in_openvino
from featherweight.export.onnx import OnnxModel
from featherweight.export.openvino import OpenVINOModel
from featherweight.export.verify import export
from featherweight.ledger import Check
from featherweight.machine import processor

_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "executorch": ("executorch", "torchao"),
}


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
