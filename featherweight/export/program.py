"""What every format starts from: the model as one torch.export program, and a file that appears whole or not at all."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from featherweight import batch
from featherweight.batch import Inputs
from featherweight.errors import ExportError


def capture(model: nn.Module, inputs: Inputs, *, dynamic_batch: bool = True) -> ExportedProgram:
    """The model in evaluation mode as a torch.export program; the model itself stays as it is.

    Args:
        model: any model torch.export can follow.
        inputs: an example of its inputs; any batch size will do.
        dynamic_batch: let the first dimension of every input that has the example's batch size take any length.
            Where the model itself fixes that length, the program is captured for the example's and a warning says why.

    Returns:
        The program, without the example's values and without the paths of your source files.

    Raises:
        ExportError: torch.export cannot follow the model.
    """
    inputs = inputs.on(model)
    reason = ""
    with batch.mode(model, training=False), quiet():
        if dynamic_batch and any(t.ndim for t in inputs.tensors()):
            try:
                return _anonymous(_captured_dynamic(model, inputs))
            except Exception as error:  # the tracer and the model's own code may raise anything
                reason = _reason(error)
        try:
            program = torch.export.export(model, inputs.args, dict(inputs.kwargs))
        except Exception as error:
            raise ExportError(
                f"torch.export cannot follow {type(model).__name__} called with {inputs}, and every format needs "
                f"that. It says: {first_line(error)}"
            ) from error
    if reason:
        warn_fixed(model, inputs, reason)
    return _anonymous(program)


def has_dynamic_batch(program: ExportedProgram) -> bool:
    """Whether any input's first dimension may take any length."""
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    return any(
        isinstance(value, Tensor) and value.ndim and isinstance(value.shape[0], torch.SymInt) for value in inputs
    )


def warn_fixed(model: nn.Module, inputs: Inputs, reason: str) -> None:
    """Say that the file of `model` will take the example's batch size only, and why."""
    warnings.warn(
        f"the exported {type(model).__name__} takes only batches of {inputs.batch_size}, the example's size: {reason}",
        UserWarning,
        stacklevel=3,
    )


@contextmanager
def draft(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, in a temporary folder beside `path`; moved to its place only when the block succeeds.

    All files written into that folder are moved, so one with its weights outside stays together.

    Raises:
        ExportError: `path` is a folder that is no package, or its folder does not exist.
    """
    target = Path(path)
    package = (target / "Manifest.json").is_file()  # Core ML's are folders
    if target.is_dir() and not package:
        raise ExportError(f"{target} is a folder: name the file to write, such as {target / 'model'}")
    if not target.parent.is_dir():
        raise ExportError(f"there is no folder {target.parent} to write {target.name} into: create it first")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield Path(folder, target.name)
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)  # what it refers to first
        for file in written:
            to = target.parent / file.name
            if to.is_dir():
                os.replace(to, Path(folder, f"{file.name}.before"))
            os.replace(file, to)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to what a sentence can hold; its class's name where it has none."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:199] + "…"


def _captured_dynamic(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    size = inputs.batch_size

    def repeated(value: Any) -> Any:
        """A batch of one twice: torch.export would take a length of 1 for a constant of the model."""
        alone = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1
        return torch.cat([value, value]) if alone else value

    args, kwargs = inputs.args, dict(inputs.kwargs)
    if size == 1:
        args, kwargs = pytree.tree_map(repeated, (args, kwargs))
        size = 2
    length = torch.export.Dim("batch")
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in batch.tensors_in((args, kwargs)):
        if tensor.ndim and tensor.shape[0] == size:
            shapes[tensor] = {0: length}
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)  # type: ignore[arg-type]


def _anonymous(program: ExportedProgram) -> ExportedProgram:
    """The program without the example's values, which may be private, and without source paths."""
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _reason(error: Exception) -> str:
    if fixed := re.search(r"specialized it to be a constant \((\d+)\)", str(error)):
        return f"its code fixes a length of {fixed[1]}"
    return first_line(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what torch warns of and logs during every export, where nobody can act on it."""
    harmless = (
        "failed while attempting to run meta",  # and raises what it has logged
        "is not installed. Skipping",  # torchvision, whose operations nobody asked for
        "has None output",  # None outputs are put back by `onnx.OnnxModel`
        "Skipping constant argument",
        # of opsets, which `onnx.write` raises where it comes to nothing
        "because the requested opset_version",
        "onnxscript version converter and fallback is enabled",
        "Failed to convert the model to the target version",
    )
    talkative = (
        "torch._subclasses.fake_tensor",
        "torch.onnx._internal.exporter._registration",
        "torch.onnx._internal.exporter._core",
        "torch.onnx._internal.exporter._compat",
        "onnxscript.version_converter",
    )
    loggers = [logging.getLogger(name) for name in talkative]

    def worth_reading(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in harmless)

    for logger in loggers:
        logger.addFilter(worth_reading)
    with warnings.catch_warnings():
        # nn.LSTM and nn.GRU put their weights into a list while they are traced, and take them out again
        rnn = r"The tensor attributes? (self\.[\w.]*_flat_weights\[\d+\](, )?)+ (was|were) assigned during export"
        warnings.filterwarnings("ignore", rnn, UserWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        # of several inputs with the same batch dimension, the exporter names the first and says so of the others
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(worth_reading)
