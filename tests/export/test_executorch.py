"""ExecuTorch programs (.pte): lowered to XNNPACK, run in ExecuTorch's own runtime, whole numbers and all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from networks import Residual, Transformer, make, task_of
from torch import Tensor, nn

import featherweight as fw
from featherweight import factorize, prune, quantize
from featherweight.batch import Inputs
from featherweight.errors import ExportError
from featherweight.export import export
from featherweight.export.executorch import ExecuTorchModel, operations
from featherweight.export.fused import in_executorch
from featherweight.export.verify import decibels, energies

pytest.importorskip("executorch")


class Net(nn.Module):
    """Positional, optional and keyword arguments; a dict with a tensor, a flag and nothing: (samples, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor, squash: bool = False, *, scale: Tensor) -> dict[str, Tensor | None]:
        x = torch.relu(self.norm(self.one(x))).mean((2, 3)) * scale
        return {"scores": self.head(x), "large": x > 0.5, "none": None}


class Wide(nn.Module):
    """What surrounds convolutions: a clip, a shared layer, a ReLU beside its input, a concatenation, pools, halves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.c, self.head = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(4, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.shared(nn.functional.relu6(self.a(x))), self.shared(self.b(x).clamp(-0.5, 0.7))
        x = torch.cat([b, torch.relu(a) + a], 1)
        p, q = nn.functional.max_pool2d(torch.relu(self.up(x)), 2).chunk(2, 1)
        return self.head(torch.relu(self.c(p * q - p)).mean((2, 3)))


def quantized(
    model: nn.Module, x: Tensor, step: quantize.Static | quantize.Dynamic | quantize.Weights
) -> fw.Compressed:
    return fw.compress(model, step, task=fw.Task(x[:16], calibration=[x]))


def test_a_float_network_answers_as_it_did_and_says_what_xnnpack_computes(tmp_path):
    model = make(Net)
    inputs = Inputs((torch.randn(4, 3, 8, 8), False), {"scale": torch.rand(4, 1)})
    with pytest.warns(UserWarning, match=r"exported Net takes only batches of 4, the example's size: ExecuTorch plans"):
        check = export(model, inputs, "executorch", tmp_path / "net.pte")
    assert check.difference < 1e-5
    assert check.bytes == (tmp_path / "net.pte").stat().st_size
    # Convolution with ReLU, a mean and its reshape, product, Linear, two transpositions; what compares is portable.
    assert check.notes == ("XNNPACK computes 7 of 8 operations; in portable kernels, which are slow: 1 gt.Scalar_out",)

    file = ExecuTorchModel(tmp_path / "net.pte")
    x, scale = torch.randn(4, 3, 8, 8), torch.rand(4, 1)
    with torch.no_grad():
        answer, expected = file(x, scale=scale), model(x, scale=scale)
    torch.testing.assert_close(answer["scores"], expected["scores"], atol=1e-5, rtol=0)
    assert torch.equal(answer["large"], expected["large"])
    assert answer["none"] is None
    with pytest.raises(ExportError, match=r"squash=True would need another export"):
        file(x, True, scale=scale)


@pytest.mark.parametrize("step", [prune.Magnitude(sparsity=0.5), prune.Channels(budget=fw.Budget(macs=0.6))])
def test_masked_and_narrowed_networks_are_floats_there(tmp_path, step):
    model = make(Residual)
    small = fw.compress(model, step, task=task_of(model))
    assert small.export("executorch", tmp_path / "m.pte", dynamic_batch=False).difference < 1e-4
    assert in_executorch(tmp_path / "m.pte").float == 5


def test_low_rank_layers_are_layers_like_any_others_there(tmp_path):
    model = make(Residual)
    small = fw.compress(model, factorize.SpatialSVD(budget=fw.Budget(macs=0.6)), task=task_of(model))
    check = small.export("executorch", tmp_path / "m.pte", dynamic_batch=False)
    assert check.difference < 1e-4
    found = operations(tmp_path / "m.pte")
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in small.model.modules())
    assert layers > 5
    assert found.xnnpack["Conv2d"] + found.xnnpack["FullyConnected"] == layers
    timings = small.time(model, ("executorch",), repeats=1)
    assert [(t.network, t.runtime) for t in timings] == [("before", "executorch"), ("after", "executorch")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[fw.Compressed, Path]:
    """The residual network at 8 bits, and its file for batches of 16."""
    small = quantized(make(Residual), Residual.data(64), quantize.Static(target="executorch"))
    path = tmp_path_factory.mktemp("whole") / "m.pte"
    small.export("executorch", path, dynamic_batch=False)
    return small, path


def test_a_quantized_network_runs_on_whole_numbers_as_its_simulation_says(whole):
    small, path = whole
    kernels = in_executorch(path)
    assert (kernels.integer, kernels.float) == (5, 0), str(kernels)
    file, images = ExecuTorchModel(path), torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        given, simulated = torch.cat([file(x) for x in images.split(16)]), small.model(images)
    assert decibels(*energies(given, simulated)[0]) > 40
    assert float((given.argmax(1) == simulated.argmax(1)).double().mean()) >= 0.99


def test_its_weights_are_bytes_in_the_file(whole):
    _, path = whole
    weights = sum(m.weight.numel() for m in Residual().modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert weights < path.stat().st_size < weights + 20_000


def test_verify_counts_its_kernels_and_times_it(whole, tmp_path):
    small, _ = whole
    with pytest.warns(UserWarning, match="takes only batches of 16"):
        (check,) = small.verify(make(Residual), tmp_path, formats=("executorch",), repeats=1)
    assert (check.runtime, check.integer_operations, check.operations) == ("executorch", 5, 5)
    assert check.latency_ms > 0
    assert check.float32_ms > 0


@pytest.mark.parametrize(
    ("settings", "integer"), [({}, 7), ({"bits": 4, "activation_bits": 5}, 7), ({"activation_bits": 16}, 0)]
)
def test_whatever_stands_between_the_layers_and_however_many_bits(tmp_path, settings, integer):
    small = quantized(make(Wide), Residual.data(64), quantize.Static(target="executorch", **settings))
    check = small.export("executorch", tmp_path / "m.pte", dynamic_batch=False)
    assert min(check.signal_to_noise_db) > 35
    kernels = in_executorch(tmp_path / "m.pte")
    assert (kernels.integer, kernels.total) == (integer, 7), str(kernels)
    assert ("activations of 16 bits are left in float32: XNNPACK has whole numbers of 8" in check.notes) == (
        not integer
    )


def test_a_network_for_another_runtime_says_which_layers_stay_in_floating_point(tmp_path):
    small = quantized(make(Residual), Residual.data(64), quantize.Static(target="onnxruntime-x86"))
    check = small.export("executorch", tmp_path / "m.pte", dynamic_batch=False)
    assert min(check.signal_to_noise_db) > 40
    assert (
        "in floating point, for their results are not rounded, which target='executorch' would do: head" in check.notes
    )
    assert in_executorch(tmp_path / "m.pte").integer == 4


@pytest.mark.parametrize(
    ("step", "integer", "note"),
    [
        (quantize.Dynamic(), 6, "ranges that are found at every call are those of each row, not of the whole batch"),
        (
            quantize.Weights(bits=8),
            0,
            "in floating point, for what they read is not rounded: queries, keys, values, wide, back, head",
        ),
    ],
    ids=["dynamic", "weights"],
)
def test_weights_alone_are_floats_there_but_for_ranges_of_each_call(tmp_path, step, integer, note):
    small = quantized(make(Transformer), Transformer.data(16), step)
    check = small.export("executorch", tmp_path / "m.pte", dynamic_batch=False)
    assert min(check.signal_to_noise_db) > 35
    assert note in check.notes
    assert in_executorch(tmp_path / "m.pte").integer == integer


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


def test_an_operation_that_executorch_lacks_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"cannot take the model: it has no operation aten\.linalg_inv_ex\.default"):
        export(Inverse(), Inputs((torch.eye(3),)), "executorch", tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_program_is_refused(tmp_path):
    (tmp_path / "m.pte").write_bytes(b"no program at all, whatever its name says" * 9)
    with pytest.raises(ExportError, match=r"ExecuTorch cannot run m\.pte"):
        ExecuTorchModel(tmp_path / "m.pte")
    with pytest.raises(ExportError, match=r"m\.pte is no ExecuTorch program"):
        operations(tmp_path / "m.pte")


def test_there_is_no_opset(tmp_path):
    with pytest.raises(ExportError, match="executorch has no opset: leave it out"):
        export(nn.Linear(4, 3), Inputs((torch.randn(2, 4),)), "executorch", tmp_path / "m.pte", opset=18)


def test_a_missing_package_is_said_with_its_extra(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "executorch" else find(name, *a))
    with pytest.raises(ExportError, match=r"pip install 'featherweight\[executorch\]'"):
        export(nn.Linear(4, 3), Inputs((torch.randn(2, 4),)), "executorch", tmp_path / "m.pte")
