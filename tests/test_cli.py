"""The command line on a small project: what every command prints and leaves, and what it says when it cannot go on."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import featherweight as fw
from featherweight import cli, compressed, progress
from featherweight.errors import ExportError
from featherweight.export import onnx, torch_export
from featherweight.ledger import Ledger

PROJECT = """
from pathlib import Path

import torch
from torch import nn

import featherweight as fw

CALLS = Path(__file__).with_name("calls.txt")
STOP = Path(__file__).with_name("stop.txt")


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 4),
    )


def task():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    answers = model()(images).detach()

    def evaluate(network):
        with CALLS.open("a") as file:
            file.write("called\\n")
        if STOP.exists() and len(CALLS.read_text().splitlines()) == int(STOP.read_text()):
            raise KeyboardInterrupt
        with torch.no_grad():
            return -(network(images) - answers).square().mean().item()

    return fw.Task(example=images[:1], calibration=images.split(16), evaluate=evaluate)
"""
RECIPE = "steps:\n  - factorize.SpatialSVD:\n      budget: {macs: 0.7}\n"
GREEDY = "steps:\n  - factorize.SpatialSVD:\n      budget: {macs: 0.6}\n      select: {greedy: {lazy: false}}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a project and two recipes, to work in; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "project.py").write_text(PROJECT, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "greedy.yaml").write_text(GREEDY, encoding="utf-8")
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def run(*arguments: str, expect: int = 0) -> None:
    assert cli.main(arguments) == expect


def calls() -> int:
    """How often the project's evaluate was called."""
    file = Path("calls.txt")
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def test_inspect_prices_every_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("inspect", "project.py")
    told = capsys.readouterr()
    rows = {line.split()[0]: line for line in told.out.splitlines() if line.strip()}
    assert "36.9 k" in rows["2"]  # 8 · 8 · 3 · 3 · 8 · 8 multiply-accumulates
    assert rows["total"].split()[1] == "Sequential"
    assert told.err == ""
    assert sorted(file.name for file in folder.iterdir()) == ["greedy.yaml", "project.py", "recipe.yaml"]


def test_plan_leaves_a_plan_that_works_as_select(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", "project.py", "recipe.yaml")
    told = capsys.readouterr()
    assert "factorize.SpatialSVD" in told.out
    assert "out/plan-1.json" in told.err
    assert sorted(file.name for file in (folder / "out").iterdir()) == ["plan-1.json"]

    plan = fw.Plan.load("out/plan-1.json")
    assert plan.layers
    text = Path("out/plan-1.json").read_text(encoding="utf-8")
    Path("chosen.yaml").write_text(
        f"steps:\n  - factorize.SpatialSVD:\n      select: {json.dumps(json.loads(text))}\n", encoding="utf-8"
    )
    run("run", "project.py", "chosen.yaml", "--out", "chosen")
    run("run", "project.py", "recipe.yaml", "--out", "budget")
    chosen, budget = Ledger.load("chosen/ledger.json"), Ledger.load("budget/ledger.json")
    assert chosen.steps[0].plan == budget.steps[0].plan == plan.to_json()["layers"]
    assert chosen.after.total == budget.after.total


def test_run_leaves_all_that_it_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("run", "project.py", "recipe.yaml", "--export", "onnx", "--time", "--repeats", "2")
    told = capsys.readouterr()
    assert {"model.fw", "model.onnx", "ledger.json", "report.html"} <= {file.name for file in Path("out").iterdir()}
    ledger = Ledger.load("out/ledger.json")
    assert ledger.after.total.macs <= 0.7 * ledger.before.total.macs
    assert {(t.network, t.runtime, t.repeats) for t in ledger.timings} == {
        (network, runtime, 2) for network in ("before", "after") for runtime in ("torch", "onnxruntime")
    }
    assert [(check.format, check.file) for check in ledger.checks] == [("onnx", "model.onnx")]
    assert "MACs" in told.out
    assert "latency, onnxruntime, batch 1" in told.out
    assert "out/model.fw" in told.err
    assert "<html" in Path("out/report.html").read_text(encoding="utf-8")


def test_run_twice_gives_the_same_and_evaluates_nothing_again(folder: Path) -> None:
    run("run", "project.py", "recipe.yaml")
    first, asked = Ledger.load("out/ledger.json"), calls()
    run("run", "project.py", "recipe.yaml")
    assert Ledger.load("out/ledger.json").steps == first.steps
    assert calls() == asked


def test_a_seed_is_taken(folder: Path) -> None:
    run("run", "project.py", "recipe.yaml", "--seed", "1")
    assert Ledger.load("out/ledger.json").steps
    asked = calls()
    run("run", "project.py", "recipe.yaml", "--seed", "2")
    assert calls() > asked  # another seed is another run: what the folder holds is not taken for it


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json"])
def test_report_writes_what_its_suffix_says(
    folder: Path, saved: Ledger, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("report", "ledger.json", name)
    assert capsys.readouterr().out == ""
    written = Path(name).read_text(encoding="utf-8")
    match name.rpartition(".")[2]:
        case "html":
            assert written.startswith("<!doctype html>")
        case "md":
            assert written.startswith("## Sequential: ")
        case "json":
            assert Ledger.load(name) == saved


def test_report_prints_the_table(folder: Path, saved: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    run("report", "ledger.json")
    assert capsys.readouterr().out.startswith("Sequential: ")


@pytest.fixture
def saved(folder: Path) -> Ledger:
    """The ledger and the file of a run, in the project's folder."""
    model, task = cli._project("project.py")
    small = fw.Recipe.load("recipe.yaml").run(model, task)
    small.save("model.fw")
    small.ledger.save("ledger.json")
    return small.ledger


def test_export_checks_what_it_writes(folder: Path, saved: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    run("export", "project.py", "model.fw", "model.onnx")
    run("export", "project.py", "model.fw", "model.pt2", "--format", "torch_export", "--fixed-batch")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["model.onnx", "model.pt2"]
    model, task = cli._project("project.py")
    images = next(iter(task.calibration))
    expected = fw.load("model.fw", into=model).model(images).detach()
    torch.testing.assert_close(onnx.session("model.onnx")(images), expected, atol=1e-5, rtol=1e-4)
    assert not onnx.session("model.onnx").training
    torch.testing.assert_close(torch_export.load("model.pt2")(images[:1]), expected[:1])


def test_verify_says_what_every_file_is_worth(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("steps:\n  - quantize.Static\n")
    model, task = cli._project("project.py")
    small = fw.Recipe.load("recipe.yaml").run(model, task)
    small.export("torch_export", "earlier.pt2")
    small.save("model.fw")
    Path("files").mkdir()
    run("verify", "project.py", "model.fw", "files", "--format", "onnx", "openvino", "--repeats", "1")
    told = capsys.readouterr().out
    rows = {line.split()[1]: line for line in told.splitlines() if line.startswith(("onnx ", "openvino "))}
    assert list(rows) == ["model.onnx", "model.xml"]
    assert all("3 of 3" in row and " dB " in row and row.count("s ") >= 2 for row in rows.values()), told
    titles = told.split("onnx ")[0].split()
    assert {"whole", "latency", "float32"} <= set(titles)
    assert "model.onnx: ONNX Runtime has no kernels in bfloat16 on this processor" in told
    assert "earlier.pt2" not in told  # which the record in the file has
    assert {"model.onnx", "model.xml"} <= {file.name for file in Path("files").iterdir()}


def test_bench_times_both_networks(folder: Path, saved: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    run("bench", "project.py", "model.fw", "--runtime", "torch", "--repeats", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["torch", "before"], ["torch", "after"]]


# What cannot be done --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("inspect missing.py", "there is no file missing.py: give a Python file that defines model() and task()"),
        ("inspect recipe.yaml", "recipe.yaml is no Python file: give one that defines model() and task()"),
        ("run project.py missing.yaml", "missing.yaml cannot be read: No such file or directory"),
        ("plan project.py missing.yaml", "missing.yaml cannot be read: No such file or directory"),
        ("report missing.json", "missing.json cannot be read: No such file or directory"),
        ("report project.py", "project.py is not a ledger"),
        ("export project.py missing.fw model.onnx", "there is no file missing.fw"),
        ("bench project.py missing.fw", "there is no file missing.fw"),
        ("verify project.py missing.fw .", "there is no file missing.fw"),
    ],
)
def test_what_is_missing_is_named(folder: Path, command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*command.split(), expect=1)
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.err
    assert told.out == ""


def test_what_cannot_be_written_is_named(folder: Path, saved: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    run("report", "ledger.json", "nowhere/report.html", expect=1)
    assert "nowhere/report.html" in capsys.readouterr().err
    run("report", "ledger.json", "report.htm", expect=1)
    assert "did you mean '.html'" in capsys.readouterr().err
    run("export", "project.py", "model.fw", "nowhere/model.onnx", expect=1)
    assert "there is no folder nowhere" in capsys.readouterr().err
    run("export", "project.py", "model.fw", "model.onnx", "--format", "onx", expect=1)
    assert "did you mean 'onnx'" in capsys.readouterr().err
    run("verify", "project.py", "model.fw", ".", "--format", "coreml", expect=1)
    assert "there are onnx, openvino, executorch" in capsys.readouterr().err
    run("verify", "project.py", "model.fw", "nowhere", "--format", "onnx", expect=1)
    assert "there is no folder nowhere" in capsys.readouterr().err
    run("bench", "project.py", "model.fw", "--runtime", "tensorrt", expect=1)
    assert "there are torch, onnxruntime and executorch" in capsys.readouterr().err
    run("bench", "project.py", "model.fw", "--runtime", "torch", "--repeats", "0", expect=1)
    assert "repeats must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("project", "said"),
    [
        ("def model(): return 1\n", "project.py defines no function task()"),
        ("model = task = 1\n", "project.py defines no function model()"),
        ("def model(): return 1\ndef task(): return 2\n", "model() in project.py returned a int, not an nn.Module"),
        (
            "from torch import nn\ndef model(): return nn.ReLU()\ndef task(): return 2\n",
            "task() in project.py returned a int, not a featherweight.Task",
        ),
        ("import nothing_of_that_name\n", "project.py failed: ModuleNotFoundError: No module named"),
        ("\n\ndef model(:\n", "project.py failed: SyntaxError: "),
        (
            "def model():\n    return layer(3)\ndef layer(size):\n    raise ValueError(f'{size} is odd')\n",
            "project.py failed: ValueError: 3 is odd, in project.py, line 4",
        ),
    ],
)
def test_what_is_wrong_with_a_project_is_named(
    folder: Path, project: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("project.py").write_text(project, encoding="utf-8")
    run("inspect", "project.py", expect=1)
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.err


def test_all_typos_of_a_recipe_are_named_on_one_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(
        "steps:\n  - factorize.SpatialSDV: {ratio: 0.5}\n  - factorize.SVD: {rato: 0.5, multiple_off: 8}\n"
    )
    run("run", "project.py", "recipe.yaml", expect=1)
    assert capsys.readouterr().err.splitlines() == [
        "The recipe cannot run (3 problems):",
        "  - there is no step 'factorize.SpatialSDV'; did you mean 'factorize.SpatialSVD'?",
        "  - factorize.SVD has no setting 'rato'; did you mean 'ratio'?",
        "  - factorize.SVD has no setting 'multiple_off'; did you mean 'multiple_of'?",
    ]
    assert not Path("out").exists()


def test_a_misspelled_command_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["inspekt", "project.py"])
    assert refused.value.code == 2
    assert "invalid choice: 'inspekt'" in capsys.readouterr().err


@pytest.mark.filterwarnings("always::featherweight.errors.NoEffect")
def test_a_step_without_effect_is_told_as_a_note(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("steps:\n  - factorize.SpatialSVD: {budget: {macs: 1.0}}\n")
    shown_by = warnings.showwarning
    run("run", "project.py", "recipe.yaml")
    assert "note: factorize.SpatialSVD changed nothing" in capsys.readouterr().err
    assert warnings.showwarning is shown_by  # the caller's own warnings go the caller's way again


def test_what_was_done_is_recorded_where_a_runtime_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ExportError("no runtime here")

    monkeypatch.setattr(compressed, "export_file", fails)
    run("run", "project.py", "recipe.yaml", "--export", "onnx", expect=1)
    assert "no runtime here" in capsys.readouterr().err
    assert Ledger.load("out/ledger.json").steps
    assert Path("out/report.html").exists()
    assert Path("out/model.fw").exists()


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


def test_after_ctrl_c_the_same_command_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("run", "project.py", "greedy.yaml", "--out", "whole")
    whole = calls()
    Path("calls.txt").unlink()

    stopped = whole // 2
    Path("stop.txt").write_text(str(stopped))
    run("run", "project.py", "greedy.yaml", "--out", "parts", expect=130)
    told = capsys.readouterr().err
    assert "interrupted; what was computed is kept in parts, and the same command goes on from there" in told
    assert calls() == stopped
    assert not Path("parts/model.fw").exists()

    Path("stop.txt").unlink()
    Path("calls.txt").unlink()
    run("run", "project.py", "greedy.yaml", "--out", "parts")
    kept = stopped - 2  # all but the original's own score and the evaluation that was interrupted
    assert calls() == whole - kept
    assert Ledger.load("parts/ledger.json").steps[0].plan == Ledger.load("whole/ledger.json").steps[0].plan


def test_ctrl_c_where_nothing_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("project.py").write_text("def model(): raise KeyboardInterrupt\n")
    run("inspect", "project.py", expect=130)
    assert capsys.readouterr().err == "interrupted\n"


# Where things are printed ---------------------------------------------------------------------------------------------


def test_bars_go_to_standard_error_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    # A clock by which everything takes more than a second.
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=itertools.count(step=2).__next__))
    run("run", "project.py", "recipe.yaml")
    told = capsys.readouterr()
    assert "fitting layers" in told.err
    assert "fitting layers" not in told.out
    assert "\x1b" not in told.out


def test_a_pipe_gets_no_bars_and_whole_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_name_of_a_layer_that_is_rather_long_as_names_go"
    Path("project.py").write_text(
        "import torch\nfrom torch import nn\nimport featherweight as fw\n"
        "def model():\n"
        "    network = nn.Sequential()\n"
        f"    network.add_module('{name}', nn.Conv2d(8, 8, 3))\n"
        "    return network\n"
        "def task(): return fw.Task(torch.ones(1, 8, 8, 8))\n"
    )
    run("run", "project.py", "recipe.yaml")
    told = capsys.readouterr()
    assert f"{name} " in told.out
    assert told.err == "out/model.fw, out/ledger.json, out/report.html\n"


# A project like those that users write --------------------------------------------------------------------------------


def test_a_project_may_import_what_lies_beside_it_and_define_classes(folder: Path) -> None:
    Path("my_layers.py").write_text("WIDTH = 3\n")
    Path("project.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "import torch\nfrom torch import nn\nimport featherweight as fw\nfrom my_layers import WIDTH\n"
        "@dataclass\nclass Settings:\n    width: ClassVar[int] = WIDTH\n    bias: bool = True\n"
        "def model(): return nn.Linear(Settings.width, 2, Settings().bias)\n"
        "def task(): return fw.Task(torch.randn(1, 3))\n"
    )
    run("inspect", "project.py")


def test_the_installed_command(folder: Path) -> None:
    command = Path(sys.executable).with_name("featherweight")
    done = subprocess.run([command, "inspect", "project.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[:3] == ["layer", "kind", "parameters"]
    assert done.stderr == ""
