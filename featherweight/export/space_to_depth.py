"""A convolution of few channels that takes strides, as one of more channels that takes none: the same sums.

Kernels for whole numbers gather the pixels under a convolution a run at a time, and the runs of an image's three
channels are short. With every square of s × s pixels laid into channels beforehand, as ONNX's operation SpaceToDepth
does (onnx.ai/onnx/operators/onnx__SpaceToDepth.html), the runs are longer and there is no stride. Output o reads the
pixels s·o − p … s·o − p + k − 1, which lie in ⌈(k + g) / s⌉ whole squares, g = s·⌈p / s⌉ − p: the weights are only
moved, with zeros where the squares reach further than the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CHANNELS = 4  # of the input, at most: with more, runs are long enough
GROWTH = 2.0  # of the weights, at most: of a 1 × 1 kernel with a stride of 2, three quarters would be zeros


@dataclass(frozen=True, eq=False)
class Unstrided:
    """A convolution whose strides are gone.

    Attributes:
        block: side of the squares that are laid into channels, as ONNX's ``SpaceToDepth`` does.
        weight: of shape (outputs, block² · channels, height, width).
        pads: in front of height and width, then behind them.
    """

    block: int
    weight: npt.NDArray[Any]
    pads: tuple[int, int, int, int]


def unstrided(
    weight: npt.NDArray[Any], size: Sequence[int], strides: Sequence[int], pads: Sequence[int], zero: int = 0
) -> Unstrided | None:
    """The convolution without its strides; None where there is nothing to gain, or it cannot be one.

    Args:
        weight: of shape (outputs, channels, height, width); no dilation, one group.
        size: height and width of what it is applied to.
        strides: down and across.
        pads: in front of height and width, then behind them.
        zero: the value that means 0, for the gaps.
    """
    outputs, channels, *kernel = weight.shape
    block = strides[0]
    if block < 2 or strides[1] != block or channels > CHANNELS or any(length % block for length in size):
        return None
    sides = [_side(kernel[at], block, pads[at], pads[at + 2], size[at]) for at in (0, 1)]
    taps = [side[1] for side in sides]
    behind = [side[2] for side in sides]
    if min(behind) < 0 or block**2 * taps[0] * taps[1] > GROWTH * kernel[0] * kernel[1]:
        return None
    wide = np.full((outputs, channels, taps[0] * block, taps[1] * block), zero, weight.dtype)
    (top, _, _), (left, _, _) = sides
    wide[:, :, top : top + kernel[0], left : left + kernel[1]] = weight
    # SpaceToDepth's channels: the row in the square, the column in it, the channel.
    parts = wide.reshape(outputs, channels, taps[0], block, taps[1], block).transpose(0, 3, 5, 1, 2, 4)
    moved = np.ascontiguousarray(parts.reshape(outputs, block**2 * channels, *taps))
    front = [-(-pad // block) for pad in pads[:2]]
    return Unstrided(block, moved, (front[0], front[1], behind[0], behind[1]))


def _side(kernel: int, block: int, front: int, behind: int, length: int) -> tuple[int, int, int]:
    """Along one side: zeros in front of the kernel, its length in squares, and the squares to pad behind."""
    pad = -(-front // block)
    gap = pad * block - front
    taps = -(-(kernel + gap) // block)
    outputs = (length + front + behind - kernel) // block + 1
    return gap, taps, outputs - 1 + taps - pad - length // block
