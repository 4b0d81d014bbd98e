"""How much layers suffer: predictions against measurements, the table, the JSON, the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import Residual, Temporal, make, task_of
from torch import nn

import featherweight as fw
from featherweight import factorize, prune, quantize
from featherweight.errors import RecipeError
from featherweight.forms import Rounded
from featherweight.score import Divergence


def test_every_layer_and_width_is_predicted_and_measured(tmp_path: Path):
    model = make(Temporal)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = task_of(model, 64)
    found = fw.sensitivity(model, task, quantize.Weights(bits=4, effort="nearest", offer=(8, 4, 2)))
    assert list(found.layers) == ["first", "grouped", "dilated", "last"]
    for points in found.layers.values():
        assert [p.setting for p in points] == ["2 bits", "4 bits", "8 bits", "as it is"]
        assert [p.share for p in points] == sorted(p.share for p in points)
        losses = [p.predicted_loss for p in points]
        assert losses == sorted(losses, reverse=True)
        scores = [p.score for p in points]
        assert scores[0] < scores[1] < scores[2] <= scores[3] == found.baseline == 1.0
    written = json.loads(json.dumps(found.to_json()))
    assert written["layers"]["grouped"][0]["option"] == "2 bits"
    found.save(tmp_path / "sensitivity.json")
    assert json.loads((tmp_path / "sensitivity.json").read_text()) == written
    text = str(found)
    assert "2 bits" in text
    assert "dilated" in text
    found.report(tmp_path / "sensitivity.html")
    assert "grouped" in (tmp_path / "sensitivity.html").read_text()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_any_technique_that_works_layer_by_layer_will_do():
    model = make(Temporal)
    found = fw.sensitivity(model, task_of(model), factorize.SVD(ratio=0.5), measure=False)
    assert found.metric == "macs"
    assert {p.setting for p in found.layers["first"]} > {"rank 1", "as it is"}
    assert {p.score for p in found.layers["first"][:-1]} == {None}
    with pytest.raises(RecipeError, match="Channels chooses nothing layer by layer"):
        fw.sensitivity(model, task_of(model), prune.Channels(ratio=0.5))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="offer has 9"):
        fw.sensitivity(model, task_of(model), quantize.Weights(offer=(9,)))


def test_activations_are_rounded_one_at_a_time_and_measured(tmp_path: Path):
    model = make(Residual)
    model.head.weight.data.mul_(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = task_of(model, 64)
    found = fw.sensitivity(model, task, quantize.Static(ignore=("down",)), activation_bits=(8, 2))
    small = fw.compress(model, quantize.Static(ignore=("down",)), task=task)
    rounded = [name for name, module in small.model.quantizers.named_modules() if isinstance(module, Rounded)]
    assert list(found.layers) == rounded
    assert found.left == {"down": "ignored, as asked"}
    for points in found.layers.values():
        assert [p.setting for p in points] == ["2 bits", "8 bits", "as it is"]
        assert points[0].predicted_loss > 10 * points[1].predicted_loss > 0 == points[2].predicted_loss
        assert points[0].score <= points[1].score <= points[2].score == found.baseline
    # By hand: the network with its input alone rounded to 2 bits.
    alone = fw.compress(
        model,
        quantize.Static(bits=16, activation_bits={"x": 2, "*": 16}, correct_biases=False, ignore=("down",)),
        task=task,
    )
    divergence = Divergence(model, task, 64)(alone.model)
    assert found.layers["x"][0].predicted_loss == pytest.approx(divergence, rel=0.05)
    assert "Divergence of the answers" in str(found)
    found.report(tmp_path / "sensitivity.html")
    assert "relu_1" in (tmp_path / "sensitivity.html").read_text()
    assert found.to_json()["by"] == "divergence"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RecipeError, match="activation_bits has 9"):
        fw.sensitivity(model, task, quantize.Static(), activation_bits=(9,))
    with pytest.raises(RecipeError, match="activation_bits is empty"):
        fw.sensitivity(model, task, quantize.Static(), activation_bits=())
    with pytest.raises(RecipeError, match=r"quantize\.Weights rounds none"):
        fw.sensitivity(model, task, activation_bits=(8,))
    with pytest.raises(RecipeError, match="the pattern 'rleu' matches none"):
        fw.sensitivity(model, task, quantize.Static(ranges={"rleu": "mse"}))


def test_a_network_without_layers_has_an_empty_table():
    found = fw.sensitivity(nn.Sequential(nn.ReLU()), fw.Task(torch.randn(1, 4)))
    assert found.layers == {}
