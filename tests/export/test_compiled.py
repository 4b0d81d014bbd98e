"""Models compiled by torch.compile: whole numbers are multiplied as such, and answers stay.

Each in a process of its own: what the compiler leaves behind in one, the tests after it should not have to live with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not torch.backends.mkldnn.is_available(), reason="needs g++ and oneDNN"
)
TESTS = Path(__file__).resolve().parents[1]
BEGIN = """
import torch
from networks import Residual, make
from torch._dynamo.utils import counters

import featherweight as fw
from featherweight import quantize
from featherweight.errors import ExportError

model = make(Residual)
x = Residual.data(1)
task = fw.Task(x, calibration=Residual.data(64).split(16))
"""


def run(script: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", BEGIN + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["onnxruntime-x86", "executorch"])
def test_whole_numbers_are_multiplied_as_such_and_answers_stay(target):
    run(f"""
small = fw.compress(model, quantize.Static(target={target!r}), task=task)
made = small.compiled()
found = counters["inductor"]
assert found["qconv_weight_prepack_matcher_count"] == 4, found
assert found["qlinear_weight_prepack_matcher_count"] == 1, found
assert made.notes == (), made.notes
with torch.no_grad():
    right = small.model.eval()(x)
    assert float((made(x) - right).abs().max()) < 0.02 * float(right.abs().max())
try:
    made(Residual.data(2))
except ExportError as error:
    assert "compile anew" in str(error)
else:
    raise AssertionError("inputs of other shapes were taken")
""")


def test_a_model_in_floating_point_compiles_too():
    run("""
small = fw.compress(model, quantize.Weights(bits=16), task=task)
with torch.no_grad():
    torch.testing.assert_close(small.compiled()(x), small.model.eval()(x), rtol=1e-4, atol=1e-5)
""")
