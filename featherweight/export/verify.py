"""An exported file held against the model it was made from: it answers as the model does, or it is not left behind."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from featherweight import batch
from featherweight.batch import Inputs
from featherweight.errors import ExportError, did_you_mean
from featherweight.export import onnx, torch_export
from featherweight.export.program import capture, draft, first_line, has_dynamic_batch, warn_fixed
from featherweight.forms import released
from featherweight.ledger import Check

# Of the largest answer. Runtimes order sums differently and fuse operations, so a network's answers differ by a few
# hundred roundings: of 1e-7 in float32, 1e-3 in float16, 8e-3 in bfloat16.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

Write = Callable[[ExportedProgram, Path], None]
Load = Callable[[Path], nn.Module]

_FORMATS: dict[str, tuple[Write, Load]] = {
    "onnx": (onnx.write, onnx.session),
    "torch_export": (torch_export.write, torch_export.load),
}


def export(
    model: nn.Module,
    inputs: Inputs,
    format: str,
    path: str | os.PathLike[str],
    batches: Sequence[Inputs] | None = None,
    *,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> Check:
    """Write the model to a file, run the file, and hold its answers against the model's.

    The file has to agree on the example, on `batches`, and, where it takes any batch size, on made-up batches of one
    and of two more than the example's. Where a model fixes its batch size, or answers by other rules at another one,
    the file takes the example's size only, and a warning says why.

    Args:
        model: the model; it stays as it is.
        inputs: an example of its inputs; its values are not written into the file.
        format: ``onnx`` or ``torch_export``.
        path: the file to write; one that exists is replaced only by a file that agrees.
        batches: real inputs to compare on.
        dynamic_batch: whether the file takes batches of any size, where the model does.
        tolerance: greatest difference allowed, as a share of the largest answer; by default 1e-3 in float32,
            1e-6 in float64, 1e-2 in float16 and 3e-2 in bfloat16.

    Returns:
        The check; its score is for the caller to fill in.

    Raises:
        ExportError: there is no such format, or the model cannot be exported, or the file does not answer as the model.
    """
    write, load = _format(format)
    inputs, plain = inputs.on(model), released(model)
    real = [given.on(model) for given in batches or ()]
    same_size = [given for given in real if given.batch_size == inputs.batch_size]
    made_up = [varied(inputs, size) for size in (1, inputs.batch_size + 2)]

    with draft(path) as file:
        held = partial(check, model, format=format, path=file, tolerance=tolerance)
        program = capture(plain, inputs, dynamic_batch=dynamic_batch)
        write(program, file)
        answering = load(file)
        if not has_dynamic_batch(program):
            return held(answering, [inputs, *same_size])
        try:
            return held(answering, [inputs, *real, *made_up])
        except ExportError as error:
            write(capture(plain, inputs, dynamic_batch=False), file)
            found = held(load(file), [inputs, *same_size])
            warn_fixed(model, inputs, first_line(error))
            return found


def opened(format: str, path: str | os.PathLike[str]) -> nn.Module:
    """An exported file as a module that runs it, for whatever asks a model, such as a task's `evaluate`.

    Raises:
        ExportError: there is no such format, or its runtime cannot run the file.
    """
    return _format(format)[1](Path(path))


def check(
    model: nn.Module,
    file_model: nn.Module,
    batches: Sequence[Inputs],
    *,
    format: str,
    path: str | os.PathLike[str],
    tolerance: float | None = None,
) -> Check:
    """Hold a file's answers against the model's, batch by batch.

    Args:
        model: the model, run in evaluation mode.
        file_model: the file as a module, such as `onnx.session` gives.
        batches: what to run both on.
        format, path: for the record; the file at `path` is measured.
        tolerance: as in `export`.

    Raises:
        ExportError: on some batch the answers differ by more than `tolerance`, or one of the two fails.
    """
    path = Path(path)
    allowed = TOLERANCES.get(batch.dtype_of(model) or torch.float32, 1e-3) if tolerance is None else tolerance
    worst = 0.0
    for inputs in batches:
        with torch.no_grad(), batch.mode(model, training=False):
            expected = _answer(model, inputs, type(model).__name__)
            found = difference(_answer(file_model, inputs, path.name), expected)
        if not found <= allowed:
            raise ExportError(
                f"{path.name} does not answer as {type(model).__name__} on {inputs}: "
                f"they differ by {found:.2g} of the largest answer, where {allowed:.2g} is allowed"
            )
        worst = max(worst, found)
    weights = path.with_name(f"{path.name}.data")  # where ONNX keeps what is too large for one file
    return Check(format, path.name, sum(f.stat().st_size for f in (path, weights) if f.exists()), worst)


def difference(a: Any, b: Any) -> float:
    """How far the answers `a` are from the answers `b`: the greatest over all tensors of max|a − b| / max|b|.

    Equal infinities, and NaN in the same place, count as equal; a value that is infinite or NaN on one side only is
    infinitely far, and so is anything from an answer of nothing but zeros.

    Args:
        a, b: tensors, or any nesting of them.

    Raises:
        ExportError: they hold different numbers of tensors, or tensors of different shapes.
    """
    ours, theirs = batch.tensors_in(a), batch.tensors_in(b)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        shapes = " against ".join(str([tuple(t.shape) for t in side]) for side in (ours, theirs))
        raise ExportError(f"the answers have different shapes: {shapes}")
    return max((_relative(x.cpu(), y.cpu()) for x, y in zip(ours, theirs, strict=True)), default=0.0)


def varied(inputs: Inputs, batch_size: int) -> Inputs:
    """Made-up inputs of another batch size, the same on every call.

    Rows of the example are repeated or left out, and the entries of each tensor put into another order, so that every
    value is one the model has to expect; where a floating-point tensor is constant, it is noise around that constant.
    Tensors without the example's batch size stay as they are.
    """
    generator = torch.Generator().manual_seed(0)

    def vary(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != inputs.batch_size:
            return value
        rows = value[torch.arange(batch_size, device=value.device) % inputs.batch_size]
        if rows.is_floating_point() and rows.numel() and bool((rows == rows.flatten()[0]).all()):
            return rows + torch.randn(rows.shape, generator=generator).to(rows)
        order = torch.randperm(rows.numel(), generator=generator).to(rows.device)
        return rows.flatten()[order].reshape(rows.shape)

    args, kwargs = pytree.tree_map(vary, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def _format(name: str) -> tuple[Write, Load]:
    if name not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ExportError(f"there is no format {name!r}{did_you_mean(name, _FORMATS)}; there are {known}")
    return _FORMATS[name]


def _answer(model: nn.Module, inputs: Inputs, name: str) -> Any:
    try:
        return inputs.into(model)
    except Exception as error:  # a runtime, or the model's own code, may raise anything
        raise ExportError(f"{name} cannot answer {inputs}: {first_line(error)}") from error


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    differing = ~((a == b) | (a.isnan() & b.isnan()))
    if not differing.any():
        return 0.0
    finite = b[b.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    distance = float((a - b)[differing].abs().max())
    return distance / largest if largest > 0 and math.isfinite(distance) else math.inf
