"""What steps that round activations let a user choose by pattern, and where it arrives: simulation, files, report."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, Transformer, make, task_of
from torch import Tensor, nn

import featherweight as fw
from featherweight import quantize
from featherweight.errors import RecipeError
from featherweight.export import fused
from featherweight.export.onnx import OnnxModel
from featherweight.export.openvino import OpenVINOModel
from featherweight.forms import Gridded, Rounded


def noise_db(given: Tensor, right: Tensor) -> float:
    return float(10 * torch.log10(right.square().sum() / (given - right).square().sum().clamp(min=1e-30)))


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def grids(model: nn.Module) -> dict[str, Gridded]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, Gridded)}
    return {name.removesuffix(".parametrizations.weight.0"): module for name, module in found.items()}


def shifted(model: nn.Module) -> nn.Module:
    """The weights of every output about a mean of its own, so that zero points have something to do."""
    torch.manual_seed(3)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)):
        size = layer.weight.detach().abs().mean()
        each = torch.randn(len(layer.weight)).reshape(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight.data.add_(2 * size * each)
    return model


CHOICES = {
    "granularity": st.sampled_from(["channel", "tensor"]),
    "symmetric": st.booleans(),
    "bits": st.sampled_from([3, 4, 8]),
    "weight_ranges": st.sampled_from(["mse", "min-max"]),
}


@settings(max_examples=5, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["conv", "depthwise", "linear"]), min_size=1, max_size=3),
    chosen=st.fixed_dictionaries({name: st.tuples(values, values) for name, values in CHOICES.items()}),
    seed=st.integers(0, 100),
)
def test_files_answer_as_the_simulation_whatever_the_weights_grids(kinds, chosen, seed, tmp_path_factory):
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.ReLU()]
    for kind in kinds:
        if kind != "linear":
            parts += [nn.Conv2d(8, 8, 3, padding=1, groups=8 if kind == "depthwise" else 1), nn.ReLU()]
    parts += [nn.Flatten(), *(nn.Linear(8 * 36, 8 * 36) for kind in kinds if kind == "linear"), nn.Linear(8 * 36, 5)]
    model, x = shifted(nn.Sequential(*parts).eval()), torch.randn(32, 3, 8, 8)
    step = quantize.Static(**{name: {"0": one, "*": other} for name, (one, other) in chosen.items()})  # type: ignore[arg-type]
    small = fw.compress(model, step, task=fw.Task(x[:1], calibration=[x]))
    for name, made in grids(small.model).items():
        assert made.scale.ndim == (chosen["granularity"][name != "0"] == "channel")
        assert made.form.symmetric == chosen["symmetric"][name != "0"]
    path = tmp_path_factory.mktemp("files") / "m.onnx"
    small.export("onnx", path, [x])
    assert noise_db(run(OnnxModel(path), x), run(small.model, x)) > 55


def test_granularity_and_symmetry_by_pattern_arrive_in_the_file_the_record_and_what_is_loaded(tmp_path):
    step = quantize.Static(granularity={"one": "tensor", "head": "tensor"}, symmetric={"head": False, "d*": False})
    model = shifted(make(Residual))
    small = fw.compress(model, step, task=task_of(model))
    small.export("onnx", tmp_path / "m.onnx")
    said = {name: choice.chosen.setting.partition("bits")[2] for name, choice in small.ledger.steps[0].choices.items()}
    assert said == {"stem": "", "one": " a tensor", "two": "", "down": ", affine", "head": " a tensor, affine"}
    graph = onnx.load(tmp_path / "m.onnx").graph
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    reads = {n.input[0].partition(".weight")[0]: n for n in graph.node if n.input[0].endswith("weight_quantized")}
    parts = {name: [held.get(i) for i in node.input[1:]] for name, node in reads.items()}
    scales = {name: part[0].shape if part[0] is not None else None for name, part in parts.items()}
    assert scales["one"] == scales["head"] == ()
    assert "axis" not in [a.name for a in reads["one"].attribute]
    zeros = {name: bool(part[1].any()) for name, part in parts.items() if len(part) > 1 and part[1] is not None}
    assert zeros == {"down": True, "head": True}
    assert fused.in_onnxruntime(tmp_path / "m.onnx").float == 0
    small.save(tmp_path / "small.fw")
    again = fw.load(tmp_path / "small.fw", make(Residual))
    x = Residual.data(16)
    assert torch.equal(run(again.model, x), run(small.model, x))
    recipe = fw.Recipe(step)
    assert fw.Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_zero_points_pay_where_weights_do_not_lie_about_zero():
    model, x = shifted(make(Residual)), Residual.data(32)

    def db(**chosen: Any) -> float:
        return noise_db(run(fw.compress(model, quantize.Static(bits=4, **chosen), task=task_of(model)).model, x), right)

    right = run(model, x)
    assert db(symmetric=False) > db() + 2
    assert db() > db(granularity="tensor") + 2


def test_dynamic_takes_them_too(tmp_path):
    model, x = shifted(make(Transformer)), Transformer.data(32)
    step = quantize.Dynamic(
        granularity={"w*": "tensor"}, symmetric={"b*": False, "w*": False}, weight_ranges={"w*": "min-max"}
    )
    small = fw.compress(model, step, task=fw.Task(Transformer.data(2)))
    made = grids(small.model)
    assert {n for n, m in made.items() if m.form.axis is None} == {"wide"}
    assert {n for n, m in made.items() if not m.form.symmetric} == {"wide", "back"}
    check = small.export("onnx", tmp_path / "m.onnx", [x])
    assert min(check.signal_to_noise_db) > 40
    assert fused.in_onnxruntime(tmp_path / "m.onnx").integer == 6


def test_biases_fit_whole_numbers_beside_one_scale_for_all_outputs(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), 1e-3 * torch.randn(64, 8)
    model[0].weight.data.mul_(1e-6)
    model[0].bias.data[0] = 100.0
    small = fw.compress(model, quantize.Static(granularity="tensor"), task=fw.Task(x[:1], calibration=[x]))
    assert noise_db(run(small.model, x), run(model, x)) > 40
    small.export("onnx", tmp_path / "m.onnx", [x])
    assert noise_db(run(OnnxModel(tmp_path / "m.onnx"), x), run(small.model, x)) > 55


def test_ranges_by_pattern_reach_their_edges_and_layers():
    model = make(Residual)

    def numbers(**chosen: Any) -> dict[str, float]:
        small = fw.compress(model, quantize.Static(correct_biases=False, **chosen), task=task_of(model))
        edges = {n.removeprefix("quantizers."): m for n, m in small.model.named_modules() if isinstance(m, Rounded)}
        return {name: float(m.scale.max()) for name, m in (edges | grids(small.model)).items()}

    whole, least = numbers(ranges="min-max", weight_ranges="min-max"), numbers()
    mixed = numbers(ranges={"x": "min-max"}, weight_ranges={"head": "min-max"})
    assert {name for name, scale in mixed.items() if scale == whole[name] != least[name]} == {"x", "head"}
    assert all(scale == least[name] for name, scale in mixed.items() if name not in ("x", "head"))


def test_symmetry_of_activations_by_pattern_runs_on_whole_numbers_in_openvino(tmp_path):
    model, x = make(Residual), Residual.data(32)
    step = quantize.Static(target="openvino", activation_symmetric={"x": False, "relu*": True})
    small = fw.compress(model, step, task=task_of(model))
    made = {n: m for n, m in small.model.quantizers.named_modules() if isinstance(m, Rounded)}
    assert not made["x"].form.symmetric
    assert int(made["x"].zero_point) > 0
    assert all(made[n].form.symmetric and made[n].form.signed for n in made if n.startswith("relu"))
    assert any(f" to {made['relu'].form}" in note for note in small.ledger.steps[0].notes)
    small.export("openvino", tmp_path / "m.xml", [x])
    opened = OpenVINOModel(tmp_path / "m.xml")
    assert noise_db(run(opened, x), run(small.model, x)) > 40
    assert fused.in_openvino(opened).float == 0


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            quantize.Static(target="openvino", symmetric={"head": False}),
            "symmetric is False for 'head': the kernels of openvino take no weights with zero points",
        ),
        (quantize.QAT(target="executorch", symmetric=False), "symmetric is False: the kernels of executorch take no"),
        (
            quantize.Static(activation_symmetric={"x": True}),
            "activation_symmetric is True for 'x': the kernels of onnxruntime-x86 take unsigned activations",
        ),
        (quantize.Static(granularity="group"), "granularity is 'group'"),
        (
            quantize.Dynamic(
                target=replace(quantize.TARGETS["generic-int8"], per_channel=False), granularity="channel"
            ),
            "granularity is 'channel': the kernels of generic-int8 have one scale for all of a weight",
        ),
        (quantize.Static(granularity={"haed": "tensor"}), "the pattern 'haed' matches none"),
        (quantize.Static(symmetric={"relu": False}), "the pattern 'relu' matches none of"),
        (quantize.Static(weight_ranges={"haed": "mse"}), "the pattern 'haed' matches none"),
        (quantize.Static(ranges={"head": "mse", "rleu": "mse"}), "the pattern 'rleu' matches none of"),
        (quantize.Static(activation_symmetric={"rleu": False}), "the pattern 'rleu' matches none of"),
        (quantize.Static(ranges={"x": "max"}), "ranges is {'x': 'max'}"),
    ],
)
def test_what_no_kernel_can_run_or_no_layer_is_named_by_is_refused(step, message):
    model = make(Residual)
    with pytest.raises(RecipeError) as found:
        fw.compress(model, step, task=task_of(model, train=lambda model, epochs: None))
    assert message in str(found.value)


def test_a_products_second_operand_stays_symmetric_where_the_target_has_it_so():
    model = make(Transformer)
    asked = quantize.Static(target="openvino", activation_symmetric=False)
    with pytest.raises(RecipeError, match="activation_symmetric is False for 'keys', the second operand of a product"):
        fw.compress(model, asked, task=task_of(model))
    step = replace(asked, activation_symmetric={"keys": True, "values": True, "*": False})
    small = fw.compress(model, step, task=task_of(model))
    made = {n: m.form.symmetric for n, m in small.model.quantizers.named_modules() if isinstance(m, Rounded)}
    assert {name for name, symmetric in made.items() if symmetric} == {"keys", "values"}


def trained(model: nn.Module, **chosen: Any) -> tuple[fw.Compressed, list[Tensor]]:
    """A network after QAT, and what it answered while batch norms stood behind its rounded weights."""
    x, answers = Residual.data(64), []

    def look(network: nn.Module, epochs: float) -> None:
        answers.append(run(network, x))

    step = quantize.QAT(learn="nothing", headroom=False, **chosen)
    return fw.compress(model, step, task=task_of(model, train=look)), answers


def test_batch_norms_are_folded_into_zero_points_and_before_the_training_where_one_scale_is_all_there_is():
    model, x = shifted(make(Residual)), Residual.data(64)
    for norm in (model.stem_norm, model.one_norm, model.two_norm):
        norm.weight.data.copy_(torch.linspace(-1.5, 2, len(norm.weight)))
    model = copy.deepcopy(model)
    small, (answers,) = trained(model, symmetric=False, granularity={"two": "tensor"})
    notes = [note for note in small.ledger.steps[0].notes if note.startswith("folded before the training")]
    assert len(notes) == 1
    assert notes[0].endswith(": two_norm")
    assert [edit["edit"] for edit in small.ledger.steps[0].edits].count("Fold") == 2
    assert noise_db(run(small.model, x), answers) > 45
    assert np.isfinite(noise_db(run(small.model, x), run(model, x)))
