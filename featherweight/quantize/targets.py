"""What runtimes can compute on whole numbers, as data: which operations, of which types, and where they want rounding.

A file whose numbers are rounded in other places than its runtime expects is correct and slow: ONNX Runtime leaves 11 of
ResNet-18's 20 convolutions in float32 where activations are signed, and OpenVINO and ONNX Runtime fuse other
operations behind a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from featherweight.errors import did_you_mean

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
PRODUCTS = ("matmul", "bmm", "mm")
# On whole numbers a shift of the range costs nothing here.
POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
CLIPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min")


@dataclass(frozen=True)
class Target:
    """A runtime; for one of your own, give a step such as ``replace(TARGETS["openvino"], name="mine", ...)``.

    Operations are named as ATen's are, such as ``"conv2d"`` or ``"adaptive_avg_pool2d"``.

    Attributes:
        name: as a setting names it.
        layers: operations with a weight, and products of two activations, that it multiplies in whole numbers.
        between: operations without weights that it computes on whole numbers, where all they read and all that reads
            them is such; they are worth no rounding of their own.
        fused: operations it computes as a part of the layer in front of them, so that rounding comes behind both.
        rounded_results: operations that it computes on whole numbers only where their result is rounded too.
        sums: whether it computes a sum as a part of one of the convolutions that are summed, whose result is then never
            rounded.
        signed: whether activations are signed; otherwise unsigned with a zero point.
        signed_products: whether the second operand of a product of two activations is signed and symmetric.
        signed_padded: whether what a convolution reads that pads is signed and symmetric, where values lie about 0:
            its kernels are slower where zero is another number than 0.
        both_signs: whether an unsigned target has kernels for signed activations as well.
        per_channel: whether a weight has a scale for every output, unless one for all of them is asked for; otherwise
            it can have no other than that.
        affine: whether a weight may have zero points: ONNX Runtime subtracts them from its sums, OpenVINO computes such
            layers in float32, and XNNPACK and the int8 of LiteRT have none.
        bits: widths of weights and activations that it has integer kernels for.
        saturates: whether sums of two products overflow 16 bits on processors that have no instruction for whole ones
            (AVX2 and AVX-512 without VNNI), so that weights need 7 bits there.
    """

    name: str
    layers: tuple[str, ...]
    between: tuple[str, ...]
    fused: tuple[str, ...]
    rounded_results: tuple[str, ...] = ()
    sums: bool = False
    signed: bool = False
    signed_products: bool = False
    signed_padded: bool = False
    both_signs: bool = False
    per_channel: bool = True
    affine: bool = False
    bits: tuple[int, ...] = (8,)
    saturates: bool = False

    def __post_init__(self) -> None:
        """Make tuples of the lists that recipes give."""
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON-ready data."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        differs = {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in differs.items()}


ONNXRUNTIME_X86 = Target(
    "onnxruntime-x86",
    layers=(*CONVOLUTIONS, "linear", *PRODUCTS),
    between=("add", "mul", "cat", "mean", "sigmoid", "leaky_relu", *POOLS),
    fused=CLIPS,
    rounded_results=(*CONVOLUTIONS, "add", "mul", "cat", "mean", "sigmoid", "leaky_relu", *POOLS),
    affine=True,
    saturates=True,
)
OPENVINO = Target(
    "openvino",
    layers=(*CONVOLUTIONS, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", *PRODUCTS),
    between=("add", "mul", "cat", "mean", *POOLS),
    fused=(*CLIPS, "sigmoid", "silu", "hardswish", "hardsigmoid", "gelu", "leaky_relu", "tanh", "elu", "mish"),
    sums=True,
    signed_products=True,
    signed_padded=True,
    both_signs=True,
    saturates=True,
)
GENERIC_INT8 = Target(
    "generic-int8",
    layers=(*CONVOLUTIONS, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", *PRODUCTS),
    between=("add", "sub", "mul", "cat", "mean", "sigmoid", "tanh", "softmax", "leaky_relu", "hardswish", *POOLS),
    fused=CLIPS,
    rounded_results=(*CONVOLUTIONS, "linear", *PRODUCTS, "add", "sub", "mul", "cat", "mean", "softmax", *POOLS),
    signed=True,
)
# XNNPACK, as ExecuTorch 1.5 hands networks to it: executorch/backends/xnnpack/partition/config.
EXECUTORCH = Target(
    "executorch",
    layers=("conv1d", "conv2d", "conv_transpose2d", "linear"),
    between=("add", "sub", "mul", "cat", "mean", "adaptive_avg_pool2d"),
    fused=CLIPS,
    rounded_results=(
        "conv1d", "conv2d", "conv_transpose2d", "linear",
        "add", "sub", "mul", "cat", "mean", "adaptive_avg_pool2d",
    ),
    signed=True,
)  # fmt: skip
TARGETS: Mapping[str, Target] = {t.name: t for t in (ONNXRUNTIME_X86, OPENVINO, GENERIC_INT8, EXECUTORCH)}


def target(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TARGETS:
        raise ValueError(f"there is no target {name!r}{did_you_mean(name, TARGETS)}; there are {', '.join(TARGETS)}")
    return TARGETS[name]
