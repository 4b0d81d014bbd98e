"""Models compiled by torch.compile: whole numbers are multiplied as such, and answers stay."""

from __future__ import annotations

import shutil

import pytest
import torch
from networks import Residual, make, task_of
from torch._dynamo.utils import counters

import featherweight as fw
from featherweight import quantize
from featherweight.errors import ExportError

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not torch.backends.mkldnn.is_available(), reason="needs g++ and oneDNN"
)


@pytest.mark.parametrize("target", ["onnxruntime-x86", "executorch"])
def test_whole_numbers_are_multiplied_as_such_and_answers_stay(target):
    model = make(Residual)
    small = fw.compress(model, quantize.Static(target=target), task=task_of(model))
    counters.clear()
    made = small.compiled()
    found = counters["inductor"]
    assert found["qconv_weight_prepack_matcher_count"] == 4
    assert found["qlinear_weight_prepack_matcher_count"] == 1
    assert made.notes == ()
    x = Residual.data(small.example.batch_size)
    with torch.no_grad():
        right = small.model.eval()(x)
        assert float((made(x) - right).abs().max()) < 0.02 * float(right.abs().max())
    with pytest.raises(ExportError, match="compile anew"):
        made(Residual.data(small.example.batch_size + 1))


def test_a_model_in_floating_point_compiles_too():
    model = make(Residual)
    small = fw.compress(model, quantize.Weights(bits=16), task=task_of(model))
    x = small.example.args[0]
    with torch.no_grad():
        torch.testing.assert_close(small.compiled()(x), small.model.eval()(x), rtol=1e-4, atol=1e-5)
