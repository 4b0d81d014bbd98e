"""What a runtime really computes on whole numbers: counted in the graph that it makes of a file on this machine."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.export.executorch import operations
from featherweight.export.onnx import OnnxModel
from featherweight.export.openvino import OpenVINOModel

# Kernels of ONNX Runtime's that multiply, and those of them that multiply whole numbers.
_INTEGER = (
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "ConvInteger", "QAttention", "MatMulNBits",
)  # fmt: skip
_FLOAT = (
    "Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "TransposeMatMul",
    "NhwcFusedConv", "Attention", "MultiHeadAttention",
)  # fmt: skip
_OPENVINO = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_FLOATS = ("f32", "bf16", "f16")  # what OpenVINO's kernels end in that multiply so


@dataclass(frozen=True)
class Kernels:
    """How many operations multiply, and how many of these on whole numbers.

    Attributes:
        integer: on whole numbers.
        float: on floating-point ones.
        left: these, by kind.
    """

    integer: int
    float: int
    left: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All that multiply."""
        return self.integer + self.float

    def __str__(self) -> str:
        rest = f"; in floating point: {', '.join(self.left)}" if self.left else ""
        return f"{self.integer} of {self.total} on whole numbers{rest}"


def in_onnxruntime(path: Path) -> Kernels:
    """The kernels of an ONNX file in ONNX Runtime on this machine.

    Raises:
        ExportError: ONNX Runtime is missing or cannot run the file.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        OnnxModel(path, optimized=optimized)
        kinds = Counter(node.op_type for node in onnx.load(optimized, load_external_data=False).graph.node)
    left = tuple(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind in _FLOAT)
    return Kernels(sum(kinds[kind] for kind in _INTEGER), sum(kinds[kind] for kind in _FLOAT), left)


def in_openvino(model: OpenVINOModel) -> Kernels:
    """The kernels of a file in OpenVINO on this machine."""
    integer, left = 0, Counter[str]()
    for operation in model.compiled.get_runtime_model().get_ops():
        info = operation.get_rt_info()
        names = ("layerType", "runtimePrecision", "primitiveType")
        kind, precision, kernel = (_said(info[name]) if name in info else "" for name in names)
        # Of a layer with compressed weights the precision is that of its weights, and only the kernel tells.
        computed = kernel.rpartition("_")[2].lower()
        precision = computed if computed in _FLOATS else precision.lower()
        if kind in _OPENVINO and precision in ("i8", "u8"):
            integer += 1
        elif kind in _OPENVINO:
            left[f"{kind} in {precision}"] += 1
    return Kernels(integer, left.total(), tuple(f"{count} {kind}" for kind, count in sorted(left.items())))


def in_executorch(path: Path) -> Kernels:
    """The kernels of a .pte file: XNNPACK's, and those of ExecuTorch where XNNPACK has none.

    Raises:
        ExportError: ExecuTorch is missing, or the file is none of its programs.
    """
    found = operations(path)
    return Kernels(
        found.whole, found.left.total(), tuple(f"{count} {kind}" for kind, count in sorted(found.left.items()))
    )


def _said(value: Any) -> str:
    """What a runtime's graph says, in whatever OpenVINO has wrapped it."""
    return str(getattr(value, "value", value))
