"""The command line: the same calls as in Python, on a project file that defines ``model()`` and ``task()``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console
from torch import nn

from featherweight import __version__
from featherweight.compressed import load, plans, time_side_by_side
from featherweight.errors import FeatherweightError, TaskError
from featherweight.inspection import inspect
from featherweight.ledger import Ledger
from featherweight.recipe import Recipe
from featherweight.report import words, write
from featherweight.report.table import table
from featherweight.task import Task

OUT = Console()
NEWS = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 refused with a reason, 130 interrupted."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: NEWS.print(f"note: {message}", style="yellow", markup=False)
    try:
        options.command(options)
    except (FeatherweightError, ValueError) as error:
        NEWS.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        kept = getattr(options, "out", None)
        more = f"; what was computed is kept in {kept}, and the same command goes on from there" if kept else ""
        NEWS.print(f"interrupted{more}", markup=False)
        return 130
    return 0


def _inspect(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    OUT.print(inspect(model, task))


def _plan(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    ledger = Recipe.load(options.recipe).plan(model, task, seed=options.seed, folder=options.out)
    OUT.print(table(ledger))
    for number, plan in plans(ledger):
        path = Path(options.out) / f"plan-{number}.json"
        plan.save(path)
        NEWS.print(f"{path}: edit it, and give it to the step as its 'select'", markup=False)


def _run(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    recipe = Recipe.load(options.recipe)
    small = recipe.run(model, task, seed=options.seed, folder=options.out)
    out = Path(options.out)
    small.save(out / "model.fw")
    if options.export:
        small.export(options.export, out / f"model.{'onnx' if options.export == 'onnx' else 'pt2'}")
    if options.time:
        small.time(model, repeats=options.repeats)
    small.ledger.save(out / "ledger.json")
    small.report(out / "report.html")
    OUT.print(table(small.ledger))
    NEWS.print(f"{out / 'model.fw'}, {out / 'ledger.json'}, {out / 'report.html'}", markup=False)


def _report(options: argparse.Namespace) -> None:
    ledger = Ledger.load(options.ledger)
    if options.to is None:
        OUT.print(table(ledger))
    else:
        write(ledger, options.to)


def _export(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    small = load(options.file, into=model)
    small.example = task.inputs()
    check = small.export(options.format, options.to, dynamic_batch=not options.fixed_batch)
    size = words.size(check.bytes)
    OUT.print(f"{options.to}: {size}, differs from the model by {check.difference:.1e}", markup=False)


def _bench(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    small = load(options.file, into=model)
    timings = time_side_by_side(model, small.model, task.inputs(), options.runtime, options.repeats)
    for timing in timings:
        spread = f"{words.latency(timing.lower_ms)} to {words.latency(timing.upper_ms)}"
        OUT.print(f"{timing.runtime:12} {timing.network:7} {words.latency(timing.median_ms):>9}  (quartiles {spread})")


def _project(path: str) -> tuple[nn.Module, Task]:
    """The model and task that a project file makes.

    Raises:
        TaskError: the file is missing, or does not define ``model()`` and ``task()``.
    """
    file = Path(path)
    if not file.is_file():
        raise TaskError(f"there is no file {path}: give a Python file that defines model() and task()")
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(file.parent.resolve()))
    specification.loader.exec_module(module)
    model, task = (_made(module, name, path) for name in ("model", "task"))
    if not isinstance(model, nn.Module):
        raise TaskError(f"model() in {path} returned a {type(model).__name__}, not an nn.Module")
    if not isinstance(task, Task):
        raise TaskError(f"task() in {path} returned a {type(task).__name__}, not a featherweight.Task")
    return model, task


def _made(module: ModuleType, name: str, path: str) -> object:
    function: Callable[[], object] | None = getattr(module, name, None)
    if not callable(function):
        raise TaskError(f"{path} defines no function {name}()")
    return function()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="featherweight", description=__doc__)
    parser.add_argument("--version", action="version", version=f"featherweight {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], None], what: str, project: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(command.__name__.removeprefix("_"), help=what, description=what)
        made.set_defaults(command=command)
        if project:
            made.add_argument("project", help="a Python file that defines model() and task()")
        return made

    add(_inspect, "what the model costs, layer by layer, and what could be replaced")
    plan = add(_plan, "what a recipe would choose; changes nothing")
    run = add(_run, "carry out a recipe: the model, its ledger and its report go to a folder")
    for command in (plan, run):
        command.add_argument("recipe", help="a YAML file with the steps")
        command.add_argument("--out", default="out", help="folder for results, and to go on from (default: out)")
        command.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    run.add_argument("--export", choices=("onnx", "torch_export"), help="also write the model for a runtime")
    run.add_argument("--time", action="store_true", help="also measure latency, in PyTorch and ONNX Runtime")
    run.add_argument("--repeats", type=int, default=50, help="timed calls (default: 50)")
    report = add(_report, "show a ledger, or write it as a page", project=False)
    report.add_argument("ledger", help="a ledger.json")
    report.add_argument("to", nargs="?", help="a .html, .md or .json file; without it, the terminal")
    export = add(_export, "write a compressed model for a runtime, and check the file there")
    bench = add(_bench, "latency of the model and of its compressed form, side by side")
    for command in (export, bench):
        command.add_argument("file", help="a .fw file")
    export.add_argument("to", help="the file to write")
    export.add_argument("--format", default="onnx", help="onnx or torch_export (default: onnx)")
    export.add_argument("--fixed-batch", action="store_true", help="only the example's batch size")
    bench.add_argument(
        "--runtime", nargs="+", default=["torch", "onnxruntime"], help="torch, onnxruntime (default: both)"
    )
    bench.add_argument("--repeats", type=int, default=50, help="timed calls (default: 50)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
