"""How much layers suffer: predictions against measurements, the table, the JSON, the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import Temporal, make, task_of
from torch import nn

import featherweight as fw
from featherweight import factorize, prune, quantize
from featherweight.errors import RecipeError


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


def test_a_network_without_layers_has_an_empty_table():
    found = fw.sensitivity(nn.Sequential(nn.ReLU()), fw.Task(torch.randn(1, 4)))
    assert found.layers == {}
