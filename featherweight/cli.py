"""The command line: the same calls as in Python, on a project file that defines ``model()`` and ``task()``."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console, RenderableType
from torch import nn

from featherweight import __version__
from featherweight.code.tensors import CODINGS
from featherweight.compressed import load, plans, time_side_by_side
from featherweight.errors import FeatherweightError, TaskError
from featherweight.inspection import inspect, inspect_file
from featherweight.ledger import Ledger
from featherweight.machine import backends, processor
from featherweight.packing import pack, unpack
from featherweight.recipe import Recipe
from featherweight.report import words, write
from featherweight.report.table import checks, table
from featherweight.task import Task

# Columns where there is no terminal to ask: names of layers stay whole in files and pipes.
PIPED_WIDTH = 120
ENDINGS = {"onnx": "onnx", "openvino": "xml", "executorch": "pte", "coreml": "mlpackage", "torch_export": "pt2"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 refused with a reason, 130 interrupted."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"note: {message}", "yellow")
        try:
            options.command(options)
        except (FeatherweightError, ValueError, OSError) as error:
            _tell(str(error), "red")
            return 1
        except KeyboardInterrupt:
            kept = getattr(options, "out", None)
            more = f"; what was computed is kept in {kept}, and the same command goes on from there" if kept else ""
            _tell(f"interrupted{more}")
            return 130
    return 0


def _show(result: RenderableType) -> None:
    """What was asked for, to standard output."""
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(result, markup=False)


def _tell(news: str, style: str = "") -> None:
    """What happened on the way, to standard error."""
    Console(stderr=True).print(news, style=style, markup=False, highlight=False, soft_wrap=True)


def _inspect(options: argparse.Namespace) -> None:
    if options.project.endswith(".fw"):
        _show(inspect_file(options.project))
        return
    model, task = _project(options.project)
    _show(inspect(model, task))


def _plan(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    ledger = Recipe.load(options.recipe).plan(model, task, seed=options.seed, folder=options.out)
    _show(table(ledger))
    for number, plan in plans(ledger):
        path = Path(options.out) / f"plan-{number}.json"
        plan.save(path)
        _tell(f"{path}: edit it, and give it to the step as its 'select'")


def _run(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    recipe = Recipe.load(options.recipe)
    small = recipe.run(model, task, seed=options.seed, folder=options.out)
    out = Path(options.out)
    small.save(out / "model.fw")
    try:
        if options.export:
            small.export(options.export, out / f"model.{ENDINGS[options.export]}")
        if options.time:
            small.time(model, repeats=options.repeats)
    finally:  # the work is done: a runtime that fails takes nothing of its record away
        small.ledger.save(out / "ledger.json")
        small.report(out / "report.html")
    _show(table(small.ledger))
    _tell(f"{out / 'model.fw'}, {out / 'ledger.json'}, {out / 'report.html'}")


def _report(options: argparse.Namespace) -> None:
    ledger = Ledger.load(options.ledger)
    if options.to is None:
        _show(table(ledger))
    else:
        write(ledger, options.to)


def _export(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    small = load(options.file, into=model)
    small.example = task.inputs()
    check = small.export(options.format, options.to, dynamic_batch=not options.fixed_batch)
    size = words.size(check.bytes)
    if check.difference is None:
        _show(f"{options.to}: {size}, {'; '.join(check.notes)}")
    else:
        _show(f"{options.to}: {size}, differs from the model by {check.difference:.1e}")


def _verify(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    small = load(options.file, into=model)
    small.example = task.inputs()
    made = small.verify(model, options.folder, formats=options.format, repeats=options.repeats)
    _show(checks(replace(small.ledger, checks=made)))  # without those that the file was saved with


def _bench(options: argparse.Namespace) -> None:
    model, task = _project(options.project)
    small = load(options.file, into=model)
    timings = time_side_by_side(model, small.model, task.inputs(), options.runtime, options.repeats)
    for timing in timings:
        spread = f"{words.latency(timing.lower_ms)} to {words.latency(timing.upper_ms)}"
        _show(f"{timing.runtime:12} {timing.network:7} {words.latency(timing.median_ms):>9}  (quartiles {spread})")


def _doctor(options: argparse.Namespace) -> None:
    _show(f"{'processor':34} {processor()}")
    _show(f"{'Python, PyTorch':34} {platform.python_version()}, {torch.__version__}")
    for backend in backends():
        found = ", ".join(f"{name} {version or 'missing'}" for name, version in backend.packages.items())
        _show(f"{backend.name:34} {found}{'' if backend.works else f': {backend.install}'}")
    if not processor().whole_products:
        _show("Sums of products of 8-bit numbers overflow here: quantize.Static leaves weights a bit of headroom.")


def _pack(options: argparse.Namespace) -> None:
    size = pack(options.source, options.target, coding=options.coding)
    whole = Path(options.source).stat().st_size
    _show(f"{options.target}: {words.size(size)}, {size / whole:.1%} of {words.size(whole)}")


def _unpack(options: argparse.Namespace) -> None:
    _show(f"{options.target}: {words.size(unpack(options.source, options.target))}")


def _project(path: str) -> tuple[nn.Module, Task]:
    """The model and task that a project file makes.

    Raises:
        TaskError: the file is missing, fails, or does not define ``model()`` and ``task()``.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise TaskError(f"there is no file {path}: give a Python file that defines model() and task()")
    specification = importlib.util.spec_from_file_location(file.stem, file)
    if specification is None or specification.loader is None:
        raise TaskError(f"{path} is no Python file: give one that defines model() and task()")
    module = importlib.util.module_from_spec(specification)
    sys.modules[file.stem] = module  # as an import would, for whatever asks a class or function where it comes from
    sys.path.insert(0, str(file.parent))
    try:
        specification.loader.exec_module(module)
        model, task = (_made(module, name, path) for name in ("model", "task"))
    except FeatherweightError:
        raise
    except Exception as error:  # whatever the user's own code raises
        calls = traceback.extract_tb(error.__traceback__)
        own = [call for call in calls if Path(call.filename).parent == file.parent]
        where = f", in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
        raise TaskError(f"{path} failed: {type(error).__name__}: {error}{where}") from error
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

    inspect_it = add(
        _inspect, "what a model costs, layer by layer, or where the bytes of a .fw file went", project=False
    )
    inspect_it.add_argument("project", help="a Python file that defines model() and task(), or a .fw file")
    plan = add(_plan, "what a recipe would choose; changes nothing")
    run = add(_run, "carry out a recipe: the model, its ledger and its report go to a folder")
    for command in (plan, run):
        command.add_argument("recipe", help="a YAML file with the steps")
        command.add_argument("--out", default="out", help="folder for results, and to go on from (default: out)")
        command.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    run.add_argument("--export", choices=tuple(ENDINGS), help="also write the model for a runtime")
    run.add_argument("--time", action="store_true", help="also measure latency, in PyTorch and ONNX Runtime")
    run.add_argument("--repeats", type=int, default=50, help="timed calls (default: 50)")
    report = add(_report, "show a ledger, or write it as a page", project=False)
    report.add_argument("ledger", help="a ledger.json")
    report.add_argument("to", nargs="?", help="a .html, .md or .json file; without it, the terminal")
    add(_doctor, "which backends work on this machine, and how to install the others", project=False)
    export = add(_export, "write a compressed model for a runtime, and check the file there")
    verify = add(_verify, "write a compressed model for every runtime here: agreement, integer kernels, times")
    bench = add(_bench, "latency of the model and of its compressed form, side by side")
    for command in (export, verify, bench):
        command.add_argument("file", help="a .fw file")
    export.add_argument("to", help="the file to write")
    export.add_argument("--format", default="onnx", help=f"{', '.join(ENDINGS)} (default: onnx)")
    export.add_argument("--fixed-batch", action="store_true", help="only the example's batch size")
    verify.add_argument("folder", help="folder to write the files to")
    verify.add_argument(
        "--format", nargs="+", help="onnx, openvino, executorch (default: those whose runtime is installed)"
    )
    bench.add_argument(
        "--runtime",
        nargs="+",
        default=["torch", "onnxruntime"],
        help="torch, onnxruntime, executorch (default: the first two)",
    )
    for command in (verify, bench):
        command.add_argument("--repeats", type=int, default=50, help="timed calls (default: 50)")
    packing = add(_pack, "a safetensors file as a smaller .fw file, to the last bit", project=False)
    packing.add_argument("source", help="a safetensors file")
    packing.add_argument("target", help="the .fw file to write")
    packing.add_argument("--coding", choices=CODINGS, default="small", help="small, fast or huffman (default: small)")
    unpacking = add(_unpack, "a .fw file as a safetensors file", project=False)
    unpacking.add_argument("source", help="a .fw file")
    unpacking.add_argument("target", help="the safetensors file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
