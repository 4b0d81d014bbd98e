"""The result of a recipe: an ordinary model with its record, saved, exported, timed and reported."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from networks import Mixed, Residual, Transformer, assert_same_state, make, task_of
from torch import nn

import featherweight as fw
from featherweight import factorize, prune
from featherweight.errors import ExportError
from featherweight.forms import LowRank
from featherweight.search.options import Plan


@pytest.fixture
def small() -> fw.Compressed:
    model = make(Mixed)
    return fw.compress(model, factorize.SVD(rank={"first": 3}), factorize.SVD(rank={"second": 2}), task=task_of(model))


def test_the_plan_is_the_last_steps_and_can_be_run_again(small):
    assert small.plan == Plan("factorize.SVD", {"second": LowRank(2)})
    model = make(Mixed)
    again = fw.compress(model, factorize.SVD(select=small.plan), task=task_of(model))
    assert [edit.layer for edit in again.edits] == ["second"]


def test_saving_is_entered_in_the_ledger(small, tmp_path):
    size = small.save(tmp_path / "small.fw")
    assert small.ledger.file_bytes == {"small.fw": size}
    assert size == (tmp_path / "small.fw").stat().st_size


def test_a_loaded_model_can_be_saved_planned_and_exported_again(small, tmp_path):
    small.save(tmp_path / "small.fw")
    loaded = fw.load(str(tmp_path / "small.fw"), into=make(Mixed, seed=2))
    assert loaded.plan == small.plan
    assert not loaded.model.training
    assert str(loaded) == str(fw.Compressed(small.model, small.edits, loaded.ledger, small.example))
    loaded.save(tmp_path / "again.fw")
    again = fw.load(tmp_path / "again.fw", into=make(Mixed, seed=3))
    assert_same_state(again.model, small.model)
    check = again.export("torch_export", tmp_path / "again.pt2")
    assert check.difference < 1e-5
    assert again.ledger.checks == (check,)


def test_a_narrowed_model_has_no_plan_and_is_loaded_timed_and_reported_like_any_other(tmp_path):
    model = make(Residual)
    narrow = fw.compress(model, prune.Channels(ratio=0.5), task=task_of(model))
    assert narrow.plan.layers == {}
    narrow.save(tmp_path / "small.fw")
    loaded = fw.load(tmp_path / "small.fw", into=make(Residual, seed=2))
    assert_same_state(loaded.model, narrow.model)
    assert loaded.example.into(loaded.model).shape == (1, 7)
    assert [timing.network for timing in loaded.time(model, runtimes=("torch",), repeats=2)] == ["before", "after"]
    assert "prune.Channels" in str(loaded)
    loaded.save(tmp_path / "again.fw")
    assert_same_state(fw.load(tmp_path / "again.fw", into=make(Residual, seed=3)).model, narrow.model)


@pytest.mark.parametrize("kind", [Residual, Transformer], ids=lambda kind: kind.__name__)
def test_the_made_up_example_of_a_loaded_model_runs(kind, tmp_path):
    model = make(kind)
    fw.compress(model, factorize.SVD(ratio=0.5), task=task_of(model)).save(tmp_path / "small.fw")
    loaded = fw.load(tmp_path / "small.fw", into=make(kind, seed=2))
    assert loaded.example.into(loaded.model).shape == (1, model.head.out_features)


def test_a_model_given_in_training_mode_comes_back_so_and_a_file_in_evaluation_mode(tmp_path):
    model = make(Residual).train()
    compressed = fw.compress(model, factorize.SVD(ratio=0.5), task=task_of(model))
    assert all(module.training for module in compressed.model.modules())
    compressed.save(tmp_path / "small.fw")
    assert not any(m.training for m in fw.load(tmp_path / "small.fw", into=make(Residual).train()).model.modules())


def test_a_trained_on_result_is_what_is_saved(small, tmp_path):
    with torch.no_grad():
        small.model.head.weight.add_(1)
    small.save(tmp_path / "small.fw")
    assert_same_state(fw.load(tmp_path / "small.fw", into=make(Mixed)).model, small.model)


def test_a_deep_copy_is_independent(small):
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.model.first.second.weight.zero_()
    assert small.model.first.second.weight.abs().sum() > 0


def test_times_of_both_are_kept(small):
    timings = small.time(make(Mixed), runtimes=("torch",), repeats=3)
    assert [(t.network, t.runtime) for t in timings] == [("before", "torch"), ("after", "torch")]
    assert all(0 < t.lower_ms <= t.median_ms <= t.upper_ms for t in timings)
    assert small.ledger.timings == timings
    with pytest.raises(
        ExportError, match=r"there is no runtime \['tensorrt'\]: there are torch, onnxruntime and executorch"
    ):
        small.time(make(Mixed), runtimes=("tensorrt",))


def test_reports_are_written(small, tmp_path):
    for name in ("report.html", "report.md", "report.json"):
        small.report(tmp_path / name)
        assert "Mixed" in (tmp_path / name).read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["steps"]) == 2
    assert "Mixed" in str(small)


def test_the_result_is_an_ordinary_model(small):
    assert isinstance(small.model, nn.Module)
    x = Mixed.data(3)
    pair = small.model.first
    assert torch.allclose(pair(x), torch.nn.functional.linear(x, pair.weight, pair.bias), atol=1e-5)
    assert (pair.in_features, pair.out_features) == (12, 24)
