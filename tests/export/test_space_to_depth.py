"""A convolution whose strides are gone gives the sums it gave, in PyTorch and in ONNX Runtime's kernels."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import featherweight as fw
from featherweight import quantize
from featherweight.export import fused
from featherweight.export.onnx import OnnxModel
from featherweight.export.space_to_depth import CHANNELS, GROWTH, unstrided


def laid(x: Tensor, block: int) -> Tensor:
    """ONNX's SpaceToDepth."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // block, block, w // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block, w // block)


@given(st.data())
def test_the_sums_are_the_same(data: st.DataObject) -> None:
    def whole(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    block, channels, zero = whole(2, 4), whole(1, CHANNELS), whole(-2, 2)
    kernel, size = [whole(1, 7) for _ in "hw"], [block * whole(4, 6) for _ in "hw"]
    pads = [whole(0, 3) for _ in range(4)]
    drawn = np.random.default_rng(whole(0, 99)).integers(-9, 9, (3, channels, *kernel))
    made = unstrided(drawn, size, (block, block), pads, zero)
    assume(made is not None)
    x = torch.randint(-9, 9, (2, channels, *size)).double()
    top, left, bottom, right = pads
    with_strides = F.conv2d(F.pad(x, (left, right, top, bottom)), torch.from_numpy(drawn - zero).double(), stride=block)
    top, left, bottom, right = made.pads
    padded = F.pad(laid(x, made.block), (left, right, top, bottom))
    assert torch.equal(F.conv2d(padded, torch.from_numpy(made.weight - zero).double()), with_strides)
    assert made.weight.size <= GROWTH * drawn.size


@pytest.mark.parametrize(
    ("shape", "size", "strides"),
    [
        ((8, 3, 3, 3), (32, 32), (1, 1)),
        ((8, 3, 3, 3), (32, 32), (2, 1)),
        ((8, 3, 3, 3), (32, 33), (2, 2)),
        ((8, CHANNELS + 1, 3, 3), (32, 32), (2, 2)),
        ((8, 3, 1, 1), (32, 32), (2, 2)),
    ],
    ids=["no strides", "two strides", "a size that is no multiple", "many channels", "mostly gaps"],
)
def test_what_gains_nothing_stays(shape, size, strides):
    assert unstrided(np.ones(shape, np.int8), size, strides, (1, 1, 1, 1)) is None


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.classify = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        found: Tensor = self.classify(x.mean((2, 3)))
        return found


def test_first_layers_in_files_take_no_strides_and_answer_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    small = fw.compress(Stem().eval(), quantize.Static(), task=fw.Task(x[:1], calibration=[x]))
    path = tmp_path / "small.onnx"
    assert min(small.export("onnx", path, [x]).signal_to_noise_db) > 35
    written = onnx.load(path).graph.node
    strides = [list(a.ints) for n in written if n.op_type == "Conv" for a in n.attribute if a.name == "strides"]
    assert strides == [[1, 1], [2, 2]], "the second has channels enough"
    assert sum(n.op_type == "SpaceToDepth" for n in written) == 1
    kernels = fused.in_onnxruntime(path)
    assert kernels.integer == kernels.total == 3
    assert torch.equal(OnnxModel(path)(x).argmax(1), small.model(x).argmax(1))
