"""Static, dynamic and trained quantization as a user meets them, the files in their runtimes included."""

from __future__ import annotations

import copy
import math
import re
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import Residual, Transformer, make, task_of, train
from torch import Tensor, nn
from torch.nn.utils import parametrize

import featherweight as fw
from featherweight import prune, quantize
from featherweight.errors import EditError, ExportError, FeatherweightError, NoEffect, RecipeError, TaskError
from featherweight.export import fused, verify
from featherweight.export.onnx import OnnxModel
from featherweight.export.openvino import OpenVINOModel
from featherweight.forms import Gridded, Rounded
from featherweight.graph import GraphError, ModelGraph


class Wide(nn.Module):
    """ReLU6, depthwise, concatenation, a shared layer, a max pool and two inputs: → (samples, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shared = nn.Conv2d(8, 8, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16, 6)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x + shift)))
        x = self.pool(nn.functional.relu6(self.depth(x)))
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.head(torch.cat([x, x * 1], 1).mean((2, 3)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def noise_db(given: Tensor, right: Tensor) -> float:
    return float(10 * torch.log10(right.square().sum() / (given - right).square().sum().clamp(min=1e-30)))


def run(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(*inputs)


@cache
def residual(**settings: object) -> tuple[nn.Module, fw.Compressed]:
    model = make(Residual)
    return model, fw.compress(model, quantize.Static(**settings), task=task_of(model))


def test_eight_bits_are_near_the_original_and_fewer_are_further_off():
    x, ratios = Residual.data(64), []
    for bits in (8, 6, 4):
        model, small = residual(bits=bits, activation_bits=bits, headroom=False)
        ratios.append(noise_db(run(small.model, x), run(model, x)))
    assert ratios[0] > 35
    # Every bit is worth about 6 dB.
    assert 16 < ratios[0] - ratios[2] < 32
    assert ratios[0] > ratios[1] > ratios[2]


def test_corrected_biases_put_the_means_of_the_answers_right():
    x = Residual.data(64)
    off = []
    for corrects in (False, True):
        model, small = residual(bits=3, activation_bits=4, correct_biases=corrects)
        off.append(float((run(small.model, x) - run(model, x)).mean(0).norm()))
    assert off[1] < 0.3 * off[0]


def test_sixteen_bits_are_as_good_as_float32():
    model, small = residual(bits=16, activation_bits=16)
    x = Residual.data(16)
    assert noise_db(run(small.model, x), run(model, x)) > 75


@pytest.mark.parametrize("ranges", ["min-max", "average", "percentile", "entropy"])
def test_every_way_of_finding_ranges_works(ranges):
    model, small = residual(ranges=ranges, weight_ranges="min-max")
    x = Residual.data(32)
    assert noise_db(run(small.model, x), run(model, x)) > 20


def test_settings_by_pattern_reach_their_layers_and_edges():
    _, small = residual.__wrapped__(bits={"head": 4, "*": 6}, activation_bits={"x": 7}, ignore=("down",))
    bits = {n: m.form.bits for n, m in small.model.named_modules() if isinstance(m, Gridded | Rounded)}
    assert bits["head.parametrizations.weight.0"] == 4
    assert bits["stem.parametrizations.weight.0"] == 6
    assert bits["quantizers.x"] == 7
    assert bits["quantizers.relu"] == 8
    assert small.ledger.steps[0].left == {"down": "ignored, as asked"}


@pytest.mark.parametrize("step", [quantize.Static, quantize.QAT])
def test_a_pattern_that_matches_nothing_is_an_error(step):
    model = make(Residual)
    settings = {"bits": {"haed": 4, "relu": 4}, "activation_bits": {"rleu": 4, "*": 6}, "ignore": ("stme", "stem")}
    with pytest.raises(RecipeError) as found:
        fw.compress(model, step(**settings), task=task_of(model, train=train))
    problems = [problem.split(": ", 1)[1] for problem in found.value.problems]
    assert [problem.partition(" matches none of ")[0] for problem in problems] == [
        "the pattern 'haed'",
        "the pattern 'relu'",  # which has no weights
        "the pattern 'rleu'",
        "the pattern 'stme'",
    ]
    assert "layers; did you mean 'head'?" in problems[0]
    assert "values; did you mean 'relu'?" in problems[2]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (quantize.Static(bits=9), "bits is 9: it can be 2 to 8, or 16"),
        (quantize.Static(activation_bits={"x": 1}), "activation_bits is 1"),
        (quantize.Static(samples=0), "samples must be at least 1"),
        (quantize.Static(target="tpu"), "target is 'tpu'"),
        (quantize.Static(ranges="max"), "ranges is 'max'"),
        (quantize.QAT(), r"needs Task\(train=...\)"),
        (quantize.GPTQ(bits="fp8"), r"'fp8', which is no type.*; there are .*e4m3, .*ternary"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(step, message):
    model = make(Residual)
    with pytest.raises(RecipeError, match=message):
        fw.compress(model, step, task=task_of(model))


def test_an_unknown_target_is_told_which_there_are():
    with pytest.raises(ValueError, match="no target 'openvno'; did you mean 'openvino'"):
        quantize.target("openvno")


def test_a_target_of_ones_own_decides_what_is_rounded_and_survives_yaml():
    mine = replace(quantize.TARGETS["openvino"], name="mine", layers=("linear",), between=(), signed=True)
    model = make(Residual)
    small = fw.compress(model, step := quantize.Static(target=mine), task=task_of(model))
    (entry,) = small.ledger.steps
    assert entry.left["stem"] == "mine has no integer kernel for conv2d"
    assert set(entry.choices) == {"head"}
    assert {m.form.signed for m in small.model.modules() if isinstance(m, Rounded)} == {True}
    recipe = fw.Recipe(step)
    assert fw.Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert quantize.Static(target=quantize.TARGETS["openvino"]) == quantize.Static(target="openvino")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{name: mine, layers: linear, between: [], fused: []}", "target: layers is 'linear', a str: it takes a list"),
        ("{name: mine, layer: [linear]}", "Target has no 'layer'; did you mean 'layers'"),
        ("{name: mine}", "missing 3 required positional arguments: 'layers', 'between', and 'fused'"),
    ],
)
def test_a_target_that_cannot_be_is_said(target, message):
    model = make(Residual)
    with pytest.raises(RecipeError, match=message):
        fw.Recipe.from_yaml(f"steps: [quantize.Static: {{target: {target}}}]").run(model, task_of(model))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_a_branch_on_values_is_refused_in_words_for_who_quantizes():
    x = torch.randn(8, 4)
    with pytest.raises(FeatherweightError, match="for activations need it; masks and quantized weights alone"):
        fw.compress(Branching().eval(), quantize.Static(), task=fw.Task(x[:1], calibration=x.split(4), loss="mse"))


def test_one_sample_is_enough_and_said_to_be_few():
    model = make(Residual)
    x = Residual.data(1)
    small = fw.compress(model, quantize.Static(), task=fw.Task(x, calibration=[x]))
    assert "the ranges are those of 1 sample: give about 64" in small.ledger.steps[0].notes
    small = fw.compress(model, quantize.Static(), task=fw.Task(x))
    assert "the ranges are those of the example: give calibration data" in small.ledger.steps[0].notes


def test_channels_that_are_zero_or_constant_stay_what_they_are(tmp_path):
    model = make(Residual)
    with torch.no_grad():
        model.one.weight[2] = 0
        model.one.weight[3] = 1e-30
        model.one_norm.bias[2] = 5.0
        model.stem.weight.zero_()
        model.stem_norm.running_mean.zero_()
    small = fw.compress(model, quantize.Static(), task=task_of(model))
    x = Residual.data(8)
    assert noise_db(run(small.model, x), run(model, x)) > 25
    check = small.export("onnx", tmp_path / "m.onnx")
    assert min(check.signal_to_noise_db) > 40


class Pruned(nn.Module):
    """Convolutions on bytes, a row of the first one all zero: (samples, 3, 8, 8) → (samples, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        with torch.no_grad():
            self.stem.weight[1], self.stem.bias[1] = 0, 8.0
            self.one.weight.div_(100)
            self.one.weight[4], self.one.bias[4] = 0, 0.4
            self.head.weight[2], self.head.bias[2] = 0, -0.7

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.one(torch.relu(self.stem(x)))).mean((2, 3)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return 255 * torch.rand(samples, 3, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("target", list(quantize.TARGETS))
@pytest.mark.parametrize("before", [(), (quantize.Weights(bits=8, effort="nearest"),)], ids=["alone", "behind weights"])
def test_rows_of_zeros_keep_their_biases(target, before, tmp_path):
    model, x = make(Pruned), Pruned.data(32)
    task = fw.Task(x[:1], calibration=x.split(16), train=lambda model, epochs: None)
    for step in (quantize.Static(target=target), quantize.QAT(target=target)):
        small = fw.compress(model, *before, step, task=task)
        assert noise_db(run(small.model, x), run(model, x)) > 35
        for name, row in (("stem", 1), ("one", 4), ("head", 2)):
            given, right = (m.get_parameter(f"{name}.bias")[row].detach() for m in (small.model, model))
            assert float(given) == pytest.approx(float(right), rel=1e-3), name
            assert not small.model.get_submodule(name).weight[row].any()
    if target in ("onnxruntime-x86", "openvino"):
        format, name = ("onnx", "m.onnx") if target == "onnxruntime-x86" else ("openvino", "m.xml")
        assert min(small.export(format, tmp_path / name, [x]).signal_to_noise_db) > 40


def test_a_range_never_seen_is_left_with_the_reason_and_keeps_the_bias_behind():
    model, x = make(Pruned), Pruned.data(32)
    with torch.no_grad():
        model.one.weight.zero_()
        model.one.bias.fill_(-1.0)
        model.head.weight.zero_()
    small = fw.compress(model, quantize.Static(), task=fw.Task(x[:1], calibration=x.split(16)))
    assert (
        "a range never seen: all of its values were 0 on the calibration data" in small.ledger.steps[0].left["relu_1"]
    )
    assert noise_db(run(small.model, x), run(model, x)) > 60


class Odd(nn.Module):
    """Attention with a mask of infinities, and a branch that no sample takes part in."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward, self.spare = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inward(x)
        wild = torch.where(y > -1e9, y, y) / (x.abs() * 0)  # infinite
        return self.outward(y) + 0 * self.spare(wild).nan_to_num(0, 0, 0) + self.spare(y[:0].sin()).sum(0)


def test_infinite_activations_and_unseen_ranges_are_left_with_the_reason():
    model = Odd().eval()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    small = fw.compress(model, quantize.Static(), task=fw.Task(x, calibration=[x]))
    left = small.ledger.steps[0].left
    assert any("infinite, NaN or beyond 1e38 on the calibration data" in reason for reason in left.values())
    assert any(reason == "no calibration sample reached it" for reason in left.values())
    assert noise_db(run(small.model, x), run(model, x)) > 25


class Rootless(nn.Module):
    """A layer that is a function of the model's own weight, and dropout: → (samples, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.head = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(nn.functional.conv2d(x, self.kernel))
        return self.head(nn.functional.dropout(x.mean((2, 3)), 0.5, self.training))


@pytest.mark.parametrize("earlier", [(), (quantize.GPTQ(bits=8),)], ids=["alone", "weights first"])
def test_a_weight_of_the_model_itself_is_rounded_like_any_other(earlier, tmp_path):
    torch.manual_seed(0)
    model, x = Rootless().eval(), torch.randn(64, 3, 8, 8)
    task = fw.Task(x[:1], calibration=x.split(16), loss="mse")
    small = fw.compress(model, *earlier, quantize.Static(), task=task)
    assert small.ledger.steps[-1].left == {}
    right = run(small.model, x)
    assert noise_db(right, run(model, x)) > 30
    again = copy.deepcopy(small.model)
    assert torch.equal(run(again, x), right)
    assert min(small.export("onnx", tmp_path / "m.onnx").signal_to_noise_db) > 40
    small.save(tmp_path / "m.fw")
    assert torch.equal(run(fw.load(tmp_path / "m.fw", into=Rootless()).model, x), right)
    assert not torch.equal(again.train()(x), right)  # dropout
    parametrize.remove_parametrizations(again, "kernel")
    assert not torch.equal(again(x), right), "it still trains"
    assert torch.equal(run(again, x), right)


def test_weights_of_an_earlier_step_keep_their_grid():
    model = make(Residual)
    steps = (quantize.Weights(bits=4, effort="nearest"), quantize.Static())
    small = fw.compress(model, *steps, task=task_of(model))
    grids = {m.form.bits for m in small.model.modules() if isinstance(m, Gridded)}
    assert grids == {4}
    assert isinstance(small.model, ModelGraph)
    assert any("keeps the weights that an earlier step" in note for note in small.ledger.steps[1].notes)


@pytest.mark.parametrize("before", [quantize.Weights(bits="fp16"), quantize.Weights(bits=4, granularity="tensor")])
def test_weights_that_no_batch_norm_can_be_folded_into_are_said_with_what_to_do(before):
    model = make(Residual)
    with pytest.raises(EditError, match=r"stem.weight .* batch norm behind it cannot be folded.*fold=False"):
        fw.compress(model, before, quantize.Static(), task=task_of(model))
    x = Residual.data(16)
    for steps in ((before, quantize.Static(fold=False)), (replace(before, ignore=("*",)), quantize.Static())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffect)
            small = fw.compress(model, *steps, task=task_of(model))
        assert noise_db(run(small.model, x), run(model, x)) > 10


class Turning(nn.Module):
    """Batch norms with negative factors, as trained networks have some."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_of_one = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm_of_two = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.last, self.norm_of_last = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for norm in (self.norm_of_one, self.norm_of_two, self.norm_of_last):
                for tensor in (norm.weight, norm.bias, norm.running_mean):
                    assert isinstance(tensor, torch.Tensor)
                    tensor.copy_(torch.randn(8, generator=generator))

    @staticmethod
    def data(count: int) -> torch.Tensor:
        return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm_of_one(self.one(x)))
        x = torch.relu(self.norm_of_two(self.two(x)))
        return self.norm_of_last(self.last(x.mean((2, 3))))


def test_weights_of_few_bits_in_front_of_negative_factors_are_folded_exactly():
    model = make(Turning)
    rounded = (quantize.GPTQ(bits=2),)
    weights = fw.compress(model, *rounded, task=task_of(model))
    small = fw.compress(model, *rounded, quantize.Static(activation_bits=16), task=task_of(model))
    x = Turning.data(64)
    assert noise_db(run(small.model, x), run(weights.model, x)) > 60
    assert not any("norm" in name for name in small.ledger.steps[-1].left)


def test_masked_weights_in_front_of_negative_factors_are_folded_exactly_too():
    model = make(Turning)
    steps = (prune.Magnitude(sparsity=0.3), quantize.GPTQ(bits=2), quantize.Static(activation_bits=16))
    small = fw.compress(model, *steps, task=task_of(model))
    weights = fw.compress(model, *steps[:2], task=task_of(model))
    assert noise_db(run(small.model, Turning.data(64)), run(weights.model, Turning.data(64))) > 60


@pytest.mark.parametrize("earlier", [(), (quantize.GPTQ(bits=4),)], ids=["alone", "weights first"])
@pytest.mark.parametrize("step", [quantize.Static(), quantize.QAT(epochs=1)], ids=["static", "trained"])
def test_files_of_networks_with_negative_factors_load_into_them(earlier: tuple[Any, ...], step: Any, tmp_path):
    model = make(Turning)
    small = fw.compress(model, *earlier, step, task=task_of(model, train=lambda network, epochs: None))
    small.save(tmp_path / "m.fw")
    x = Turning.data(16)
    assert torch.equal(run(fw.load(tmp_path / "m.fw", into=model).model, x), run(small.model, x))


@pytest.mark.parametrize("turned_in_training", [False, True])
def test_training_on_few_bits_loses_nothing_where_factors_are_negative(turned_in_training: bool):
    model, x, seen = make(Turning), Turning.data(64), {}

    def train(network: nn.Module, epochs: float) -> None:
        if turned_in_training:
            with torch.no_grad():
                network.get_parameter("norm_of_one.weight")[:4].neg_()
        seen["answers"] = run(copy.deepcopy(network).eval(), x)

    task = task_of(model, train=train)
    small = fw.compress(model, quantize.QAT(bits=2, activation_bits=16, learn="nothing"), task=task)
    assert noise_db(run(small.model, x), seen["answers"]) > 60
    stayed = [reason for reason in small.ledger.steps[0].left.values() if "no opposite" in reason]
    assert len(stayed) == turned_in_training


def test_a_step_behind_one_that_rounds_activations_says_why_it_cannot():
    model = make(Residual)
    with pytest.raises(GraphError, match="is quantized already, by an earlier step: leave one of the two out"):
        fw.compress(model, quantize.Static(), quantize.Static(), task=task_of(model))
    with pytest.warns(NoEffect, match="an earlier step has made the network a graph.*: move this step above it"):
        fw.compress(model, quantize.Static(), quantize.GPTQ(bits=4), task=task_of(model))


# In the runtimes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[fw.Compressed, Path]:
    """The residual network at 8 bits, as an ONNX and as an OpenVINO file."""
    _, small = residual()
    folder = tmp_path_factory.mktemp("exported")
    small.export("onnx", folder / "m.onnx", [Residual.data(64)])
    small.export("openvino", folder / "m.xml", [Residual.data(64)])
    return small, folder


def test_files_answer_as_the_simulation_does_for_any_batch(exported):
    small, folder = exported
    x = Residual.data(256)
    simulated = run(small.model, x)
    for model in (OnnxModel(folder / "m.onnx"), OpenVINOModel(folder / "m.xml")):
        given = run(model, x)
        assert noise_db(given, simulated) > 40
        assert float((given.argmax(1) == simulated.argmax(1)).double().mean()) >= 0.995


class Joined(nn.Module):
    """Two convolutions whose results are summed, and one behind them: → (samples, 8, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.last(torch.relu(self.one(x) + self.other(x)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("target", "ending"), [("onnxruntime-x86", "onnx"), ("openvino", "xml")])
def test_a_file_rounds_biases_and_sums_as_the_simulation_does(bits, target, ending, tmp_path):
    model = make(Joined)
    step = quantize.Static(bits=bits, activation_bits=bits, target=target)
    small = fw.compress(model, step, task=task_of(model))
    path = tmp_path / f"small.{ending}"
    small.export("onnx" if ending == "onnx" else "openvino", path, tolerance=1.0)
    opened = OnnxModel(path) if ending == "onnx" else OpenVINOModel(path)
    x = Joined.data(64)
    # A bias or a sum rounded otherwise costs all of this but 10 to 30 dB; a number that tips here and there, little.
    assert noise_db(run(opened, x), run(small.model, x)) > 55


def test_every_layer_runs_on_whole_numbers(exported):
    _, folder = exported
    kernels = fused.in_onnxruntime(folder / "m.onnx")
    assert (kernels.integer, kernels.float) == (5, 0), str(kernels)
    kernels = fused.in_openvino(OpenVINOModel(folder / "m.xml"))
    assert (kernels.integer, kernels.float) == (5, 0), str(kernels)


def test_weights_are_in_the_file_as_bytes_with_a_scale_for_every_output(exported):
    _, folder = exported
    graph = onnx.load(folder / "m.onnx").graph
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    weights = {n: t for n, t in tensors.items() if n.endswith("weight_quantized")}
    assert {t.dtype for t in weights.values()} == {np.dtype(np.int8)}
    assert len(weights) == 5
    assert not any(t.dtype == np.float32 and t.size > 64 for t in tensors.values()), "no weight in float32 beside them"
    kinds = {node.op_type for node in graph.node}
    zeros = [name for name, t in tensors.items() if t.size > 1 and not t.any()]
    assert len(zeros) == sum(node.op_type == "Gemm" for node in graph.node), "zero points that go without saying"
    assert {"QuantizeLinear", "DequantizeLinear", "GlobalAveragePool"} <= kinds
    assert not kinds & {"Relu", "BatchNormalization", "ReduceMean"}


@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino"])
def test_relu6_depthwise_shared_layers_and_two_inputs(target, tmp_path):
    model = make(Wide)
    x, shift = Wide.data(32), torch.randn(32, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    task = fw.Task((x[:2], shift[:2]), calibration=[(x, shift)])
    small = fw.compress(model, quantize.Static(target=target), task=task)
    assert noise_db(run(small.model, x, shift), run(model, x, shift)) > 25
    for format, name in (("onnx", "m.onnx"), ("openvino", "m.xml")):
        check = small.export(format, tmp_path / name, [(x, shift)])
        assert min(check.signal_to_noise_db) > 35, format
    if target == "onnxruntime-x86":
        kernels = fused.in_onnxruntime(tmp_path / "m.onnx")
        assert kernels.float == 0, str(kernels)


class Uneven(nn.Module):
    """A depthwise convolution whose channels differ a hundredfold, and a Linear layer likewise: → (samples, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 10)
        with torch.no_grad():
            spread = torch.logspace(-2, 0, 16)
            self.stem.weight.mul_(spread.view(-1, 1, 1, 1))
            self.stem.bias.mul_(spread)
            self.depth.weight.mul_(spread.flip(0).view(-1, 1, 1, 1))
            self.head.weight.mul_(100 * spread.flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.depth(torch.relu(self.stem(x)))).mean((2, 3)))


UNEVEN = {
    "16 bits": (quantize.Static(bits=16),),
    "groups": (quantize.Weights(bits=8, group=3, effort="nearest", ignore=("head",)), quantize.Static()),
}


@pytest.mark.parametrize("steps", UNEVEN.values(), ids=UNEVEN)
def test_weights_that_are_no_bytes_are_computed_with_in_float32(steps, tmp_path):
    torch.manual_seed(0)
    model, x = Uneven().eval(), torch.randn(64, 3, 16, 16)
    small = fw.compress(model, *steps, task=fw.Task(x[:1], calibration=x.split(16), loss="mse"))
    check = small.export("onnx", tmp_path / "m.onnx", [x])
    assert min(check.signal_to_noise_db) > 80
    assert not [note for note in check.notes if "signal to noise" in note]


def test_answers_far_from_the_simulations_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "USUAL_DB", 190.0)
    _, small = residual.__wrapped__()
    check = small.export("onnx", tmp_path / "m.onnx")
    assert re.search(r"only \d+ dB of signal to noise from the model's answers, where 190 are usual", check.notes[-1])


def test_products_of_attention_run_on_whole_numbers(tmp_path):
    model = make(Transformer)
    small = fw.compress(model, quantize.Static(), task=task_of(model))
    assert min(small.export("onnx", tmp_path / "m.onnx").signal_to_noise_db) > 40
    kernels = fused.in_onnxruntime(tmp_path / "m.onnx")
    assert (kernels.integer, kernels.float) == (8, 0), str(kernels)


def test_dynamic_ranges_fuse_with_their_products(tmp_path):
    model = make(Transformer)
    small = fw.compress(model, quantize.Dynamic(), task=fw.Task(Transformer.data(2)))
    x = Transformer.data(32)
    assert noise_db(run(small.model, x), run(model, x)) > 30
    assert min(small.export("onnx", tmp_path / "m.onnx").signal_to_noise_db) > 40
    kernels = fused.in_onnxruntime(tmp_path / "m.onnx")
    assert kernels.integer == 6, str(kernels)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_few_bits_take_few_bits_in_the_file_and_mean_the_same(bits, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64)).eval()
    x = torch.randn(8, 16, 5, 5)
    small = fw.compress(model, quantize.Static(bits=bits), task=fw.Task(x[:2], calibration=[x]))
    for format, name in (("onnx", "m.onnx"), ("openvino", "m.xml")):
        check = small.export(format, tmp_path / name, [x])
        assert min(check.signal_to_noise_db) > 40
        assert any("stored as tables" in note for note in check.notes) == (bits < 4)
    size = (tmp_path / "m.onnx").stat().st_size
    stored_bits = 8 if bits > 4 else bits
    weights = 64 * 16 * 9 + 576 * 64
    assert weights * stored_bits / 8 < size < weights * stored_bits / 8 + 12_000


@pytest.mark.parametrize(
    ("bits", "ending", "narrow"),
    [
        ("fp16", "onnx", True),
        ("bf16", "onnx", True),
        ("e4m3", "onnx", False),
        ("fp16", "xml", True),
        ("bf16", "xml", False),
    ],
)
def test_weights_of_shorter_floating_point_types_are_written_so_or_noted(bits, ending, narrow, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 64)).eval()
    small = fw.compress(model, quantize.Weights(bits=bits, effort="nearest"), task=fw.Task(torch.randn(1, 3, 8, 8)))
    check = small.export("onnx" if ending == "onnx" else "openvino", tmp_path / f"m.{ending}")
    assert check.difference < 1e-5
    assert (check.bytes < 2.1 * 64 * 64 * 36) == narrow
    assert check.notes == (() if narrow else (f"weights of type {bits} are written in the model's own type",))


def test_four_bit_weights_alone_become_blocks_that_onnxruntime_multiplies(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    x = torch.randn(8, 128)
    small = fw.compress(model, quantize.Weights(bits=4, group=32, effort="nearest"), task=fw.Task(x[:2]))
    check = small.export("onnx", tmp_path / "m.onnx", [x])
    assert check.difference < 1e-3
    assert [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node].count("MatMulNBits") == 2
    assert small.export("openvino", tmp_path / "m.xml", [x]).difference < 1e-3


def test_a_file_has_little_beside_its_weights_and_its_runtime_works_that_out_once(tmp_path):
    torch.manual_seed(0)
    layers = nn.Conv2d(64, 512, 1), nn.ReLU(), nn.Conv2d(512, 512, 3, groups=512), nn.ReLU(), nn.Conv2d(512, 256, 1)
    model, x = nn.Sequential(*layers).eval(), torch.randn(8, 64, 5, 5)
    model[2].bias.data[0] = 5000.0  # more than 16 bits
    weights, outputs = 64 * 512 + 512 * 9 + 512 * 256, 512 + 512 + 256
    for target, format, name in (("onnxruntime-x86", "onnx", "m.onnx"), ("openvino", "openvino", "m.xml")):
        small = fw.compress(model, quantize.Static(target=target), task=fw.Task(x[:2], calibration=[x]))
        assert min(small.export(format, tmp_path / name, [x]).signal_to_noise_db) > 40
    # A scale is a float16; a bias 2 bytes, or 4 for all of a layer where one of them takes more; OpenVINO's are floats.
    size = (tmp_path / "m.onnx").stat().st_size
    assert size - weights < outputs * (2 + 2) + 512 * 2 + 3000
    assert (tmp_path / "m.bin").stat().st_size - weights < outputs * (2 + 4) + 200
    OnnxModel(tmp_path / "m.onnx", optimized=tmp_path / "optimized.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert not {"Cast", "Mul"} & set(kinds)
    kernels = fused.in_openvino(OpenVINOModel(tmp_path / "m.xml"))
    assert (kernels.integer, kernels.float) == (3, 0), str(kernels)


def test_an_opset_without_the_types_is_refused(tmp_path):
    _, small = residual(bits=4, activation_bits=4)
    with pytest.raises(ExportError, match=r"opset 18 has no whole numbers of 4 and 16 bits.*21 or more"):
        small.export("onnx", tmp_path / "m.onnx", opset=18)
    assert not (tmp_path / "m.onnx").exists()


def test_half_precision_halves_a_file_and_is_refused_for_rounded_activations(tmp_path):
    model = make(Transformer)
    plain = fw.compress(model, quantize.Weights(bits=8), task=fw.Task(Transformer.data(2)))
    check = plain.export("onnx", tmp_path / "half.onnx", half=True)
    assert check.difference < 1e-2
    assert {t.data_type for t in onnx.load(tmp_path / "half.onnx").graph.initializer} <= {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.INT64,
    }
    with pytest.raises(ExportError, match="too coarse"):
        residual()[1].export("onnx", tmp_path / "m.onnx", half=True)


def test_a_missing_runtime_is_said_with_its_extra(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a))
    _, small = residual()
    with pytest.raises(ExportError, match=r"pip install 'featherweight\[openvino\]'"):
        small.export("openvino", tmp_path / "m.xml")


def test_openvino_files_have_their_ending(tmp_path):
    _, small = residual()
    with pytest.raises(ExportError, match=r"end in .xml and .bin: name the first, such as model.xml"):
        small.export("openvino", tmp_path / "model.ov")


def test_verify_says_what_every_file_is_worth(tmp_path):
    model, small = residual.__wrapped__()
    checks = small.verify(model, tmp_path, repeats=3)
    assert [check.runtime for check in checks][:2] == ["onnxruntime", "openvino"]
    for check in checks[:2]:
        assert (check.integer_operations, check.operations) == (5, 5)
        assert check.latency_ms > 0
        assert check.float32_ms > 0
        slower = check.latency_ms >= check.float32_ms
        assert any("not faster" in note for note in check.notes) == slower or check.bfloat16_ms is not None
    assert small.ledger.checks == checks
    small.report(tmp_path / "report.md")
    assert "5 of 5" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("step", [quantize.Weights(bits=8), quantize.Weights(bits=3), quantize.Ternary()], ids=str)
def test_a_file_of_quantized_weights_is_judged_without_what_openvino_rounds_by_itself(step, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(64, 32)
    small = fw.compress(model, step, task=fw.Task(x[:1], calibration=x.split(16), loss="mse"))
    check = small.export("openvino", tmp_path / "m.xml")
    assert check.difference < 1e-5
    left = run(OpenVINOModel(tmp_path / "m.xml", rounds_inputs=True), x[:1])
    off = float((left - run(small.model, x[:1])).abs().max() / run(small.model, x[:1]).abs().max())
    said = [note for note in check.notes if "DYNAMIC_QUANTIZATION_GROUP_SIZE=0" in note]
    assert len(said) == (off > 1e-4)  # processors without instructions for whole numbers round nothing
    assert all(float(note.split("off by ")[1].split()[0]) == pytest.approx(off, rel=0.05) for note in said)
    kernels = fused.in_openvino(OpenVINOModel(tmp_path / "m.xml"))
    assert (kernels.integer, kernels.float) == (0, 3), str(kernels)


def test_ranges_of_each_call_are_said_to_gain_nothing_in_openvino(tmp_path):
    model = make(Transformer)
    small = fw.compress(model, quantize.Dynamic(), task=fw.Task(Transformer.data(2)))
    (check,) = small.verify(model, tmp_path, formats="openvino", repeats=1)
    assert check.integer_operations == 0
    assert "layers that find their range at every call are computed in floating point there" in check.notes
    assert any(note.startswith("in floating point: ") for note in check.notes)


def test_verify_lists_a_format_that_fails_beside_those_that_work(tmp_path, monkeypatch):
    import importlib.util

    model, small = residual.__wrapped__()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a))
    works, fails = small.verify(model, tmp_path, formats=("onnx", "openvino"), repeats=1)
    assert works.operations == 5
    assert (fails.format, fails.bytes, fails.difference) == ("openvino", 0, None)
    assert "pip install 'featherweight[openvino]'" in fails.notes[0]
    assert small.ledger.checks == (works, fails)
    small.report(tmp_path / "report.md")
    assert "model.xml: not verified: OpenVINO is not installed" in (tmp_path / "report.md").read_text()
    with pytest.raises(ExportError, match="OpenVINO is not installed here"):
        small.verify(model, tmp_path, formats="openvino")
    assert small.ledger.checks == (works, fails)


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", ["lsq", "lsq+", "pact", "nothing"])
def test_training_learns_what_is_asked_and_exports_what_was_trained(learn, tmp_path):
    model = make(Residual)
    task = task_of(model, train=train)
    begun = fw.compress(model, quantize.QAT(bits=4, activation_bits=4, epochs=1, learn="nothing"), task=task)
    step = quantize.QAT(bits=4, activation_bits=4, epochs=4, learn=learn)
    small = fw.compress(model, step, task=task)
    scales = [{n: p for n, p in m.model.named_parameters() if n.endswith(".scale")} for m in (begun, small)]
    edges = [n for n in scales[0] if n.startswith("quantizers")]
    moved = [n for n in edges if not torch.equal(scales[0][n], scales[1][n])]
    assert bool(moved) == (learn != "nothing")
    assert not any(p.requires_grad for p in scales[1].values())
    zero_points = [m.zero_point for m in small.model.modules() if isinstance(m, Rounded)]
    assert all(float(z) == round(float(z)) for z in zero_points)
    assert not [n for n in small.model.state_dict() if "running" in n], "batch norms are folded afterwards"
    assert min(small.export("onnx", tmp_path / "m.onnx", [Residual.data(64)]).signal_to_noise_db) > 25


def test_training_with_the_original_as_teacher_comes_nearer_to_it():
    model = make(Residual)
    data = Residual.data(64)

    def train(model: nn.Module, epochs: float, loss: object = None) -> None:
        model.train()
        assert loss is not None
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
        for _ in range(round(epochs)):
            optimizer.zero_grad()
            loss(model(data), None).backward()
            optimizer.step()

    task = fw.Task(data[:1], calibration=data.split(16), train=train)
    settings = {"bits": 3, "activation_bits": 3}
    static = fw.compress(model, quantize.Static(**settings, correct_biases=False), task=task)
    trained = fw.compress(model, quantize.QAT(**settings, epochs=40, distill=True), task=task)
    right = run(model, data).log_softmax(-1)

    def divergence(small: fw.Compressed) -> float:
        answers = run(small.model, data).log_softmax(-1)
        return float(nn.functional.kl_div(answers, right, reduction="batchmean", log_target=True))

    assert divergence(trained) < 0.9 * divergence(static)


def test_a_train_without_a_loss_cannot_distil():
    model = make(Residual)
    task = task_of(model, train=lambda model, epochs: None)
    with pytest.raises(TaskError, match=r"distillation calls train\(model, epochs, loss=...\)"):
        fw.compress(model, quantize.QAT(distill=True), task=task)


@pytest.mark.parametrize("factor", [math.nan, -1e9])
def test_training_that_diverges_is_said_with_the_place(factor):
    def ruin(model: nn.Module, epochs: float, loss: object = None) -> None:
        for name, p in model.named_parameters():
            if "quantizers.relu." in name:  # in a distillation of a network that is inside another
                p.data.fill_(factor)

    model = make(Residual)
    for distill in (True, False):
        with pytest.raises(TaskError, match=r"in [\w.]*quantizers\.relu\.\w+(, .*)?: lower its learning rate"):
            fw.compress(model, quantize.QAT(distill=distill), task=task_of(model, train=ruin))


class Pooled(nn.Module):
    """Small numbers behind a pool, and a large loss: (samples, 3, 8, 8) → (samples, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        return self.head(silu(self.two(silu(self.one(x)))).mean((2, 3)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(8))


def trained(learn: str, bits: int, optimizer: str, rate: float, seed: int = 0) -> tuple[fw.Compressed, float]:
    """A network of asymmetric activations, and the loss that its training ended with."""
    x = Pooled.data(64)
    right = (x.mean((2, 3)).sum(1) * 20).long() % 7

    def train(model: nn.Module, epochs: float) -> None:
        made = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], lr=rate)
        falls = torch.optim.lr_scheduler.LinearLR(made, 1.0, 0.02, 60)
        for _ in range(60):
            made.zero_grad()
            nn.functional.cross_entropy(10 * model(x), right).backward()
            made.step()
            falls.step()

    step = quantize.QAT(bits=bits, activation_bits=bits, learn=learn)
    small = fw.compress(make(Pooled, seed), step, task=fw.Task(x[:1], calibration=x.split(16), train=train))
    return small, float(nn.functional.cross_entropy(10 * run(small.model, x), right))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("optimizer", "rate"), [("SGD", 0.02), ("Adam", 0.01)])
def test_steps_of_every_size_are_learned_at_ordinary_rates(bits, optimizer, rate):
    held = trained("nothing", bits, optimizer, rate)[1]
    for learn in ("lsq", "lsq+", "pact"):
        assert trained(learn, bits, optimizer, rate)[1] < held + 0.1


def test_offsets_that_are_learned_end_elsewhere_and_better_than_steps_alone():
    losses = []
    for seed in range(3):
        (alone, loss_alone), (both, loss) = (trained(learn, 4, "Adam", 0.003, seed) for learn in ("lsq", "lsq+"))
        ends = [
            {n: float(m.zero_point.detach()) for n, m in small.model.named_modules() if isinstance(m, Rounded)}
            for small in (alone, both)
        ]
        assert ends[0] != ends[1]
        assert not torch.equal(run(both.model, Pooled.data(8)), run(alone.model, Pooled.data(8)))
        losses.append((loss_alone, loss))
    assert sum(loss for _, loss in losses) < sum(loss for loss, _ in losses)


# Biases are rounded in the end, in steps that are the coarser the fewer bits the numbers they are added to have.
@pytest.mark.parametrize(("bits", "decibels"), [(8, 45), (4, 25)])
def test_a_folded_trained_network_answers_as_while_it_was_trained(bits: int, decibels: float):
    model = make(Residual)
    held = {}

    def watch(model: nn.Module, epochs: float) -> None:
        train(model, epochs, data=Residual.data(8))
        held["model"] = copy.deepcopy(model).eval()

    task = task_of(model, train=watch)
    small = fw.compress(model, quantize.QAT(bits=bits, activation_bits=bits, epochs=3), task=task)
    x = Residual.data(64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert noise_db(run(small.model, x), run(held["model"], x)) > decibels


def test_batches_that_the_graph_does_not_take_are_said_with_their_lengths():
    class PositionsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(6, 16, 8)
    with pytest.raises(TaskError, match=r"with float32\[6, 4, 8\].*batch of float32\[6, 16, 8\]: lengths"):
        fw.compress(PositionsFirst().eval(), quantize.Static(), task=fw.Task(x[:, :4], calibration=[x], loss="mse"))
