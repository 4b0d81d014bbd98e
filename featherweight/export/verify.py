"""An exported file held against the model it was made from: it answers as the model does, or it is not left behind."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight import batch
from featherweight.batch import Inputs
from featherweight.errors import ExportError, did_you_mean
from featherweight.export import coreml, executorch, onnx, openvino, torch_export
from featherweight.export.program import capture, draft, first_line, has_dynamic_batch, warn_fixed
from featherweight.export.quantized import Weight, is_quantized, marked
from featherweight.forms import Floating, constrained_tensors, constraints_on, released
from featherweight.ledger import Check

# Of the largest answer. Runtimes order sums differently and fuse operations, so a network's answers differ by a few
# hundred roundings: of 1e-7 in float32, 1e-3 in float16, 8e-3 in bfloat16.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

# Where activations are rounded, a rounding of one runtime's sum may tip a number to the next step of its grid, which
# later layers carry on: such a file is judged by the energy of what it is off, and not by its worst number.
LEAST_DB = 20.0
USUAL_DB = 40.0  # and less is worth a note
MOST_DB = 200.0  # of answers that are equal
NOT_ROUNDED = 1e-5  # by which answers may differ, of the largest, that are sums in float32 in another order
HINTS = {
    "openvino": "; it sums convolutions' results without rounding them first: make the model with target='openvino'"
}


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        write: a captured program to a path; returns what the file's reader should know.
        load: the file as a module.
        whole: whether whole numbers are written as such, out of a program whose numbers are marked.
        runtime: what runs the file.
        opset: whether it is written in ONNX's operators, of which there are several versions.
        narrow: types of `Float` whose values are written in as many bits as they have.
        fixed: why it takes batches of one size only; empty where it takes any.
        prepare: the model to capture, given the model and whether to compute in float16, and what else `write` takes;
            None where that is the model of ordinary tensors, cast, and nothing else.
        as_it_runs: the file as its runtime runs it where it is not told to keep to what the file says; None where there
            is no difference.
        runs_here: whether this system can have the runtime; None where all can. Where it cannot, `write` alone sees to
            it that the file holds the model, and its answers are not compared.
    """

    write: Callable[..., tuple[str, ...]]
    load: Callable[[Path], nn.Module]
    whole: bool
    runtime: str
    opset: bool = False
    narrow: tuple[str, ...] = ()
    fixed: str = ""
    prepare: Callable[[nn.Module, bool], tuple[nn.Module, dict[str, Any]]] | None = None
    as_it_runs: Callable[[Path], nn.Module] | None = None
    runs_here: Callable[[], bool] | None = None

    @property
    def runs(self) -> bool:
        """Whether files can be run on this system."""
        return self.runs_here is None or self.runs_here()


FORMATS: dict[str, Format] = {
    "onnx": Format(onnx.write, onnx.session, True, "onnxruntime", opset=True, narrow=("fp16", "bf16")),
    "openvino": Format(
        openvino.write,
        openvino.OpenVINOModel,
        True,
        "openvino",
        opset=True,
        narrow=("fp16",),
        as_it_runs=partial(openvino.OpenVINOModel, rounds_inputs=True),
    ),
    "executorch": Format(executorch.write, executorch.ExecuTorchModel, True, "executorch", fixed=executorch.FIXED),
    "coreml": Format(
        coreml.write, coreml.CoreMLModel, False, "coreml", prepare=coreml.prepare, runs_here=coreml.runs_here
    ),
    "torch_export": Format(torch_export.write, torch_export.load, False, "torch"),
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
    opset: int | None = None,
    half: bool = False,
) -> Check:
    """Write the model to a file, run the file, and hold its answers against the model's.

    The file has to agree on the example, on `batches`, and, where it takes any batch size, on made-up batches of one
    and of two more than the example's. Where a model or the format fixes the batch size, or the model answers by other
    rules at another one, the file takes the example's size only, and a warning says why. A file whose runtime this
    system cannot have, such as ``coreml`` anywhere but on macOS, is looked through instead of run, as its notes say.

    Args:
        model: the model; it stays as it is.
        inputs: an example of its inputs; its values are not written into the file.
        format: ``onnx``, ``openvino``, ``executorch``, ``coreml`` or ``torch_export``.
        path: the file to write; one that exists is replaced only by a file that agrees.
        batches: real inputs to compare on.
        dynamic_batch: whether the file takes batches of any size, where the model does.
        tolerance: greatest difference allowed, as a share of the largest answer; by default 1e-3 in float32,
            1e-6 in float64, 1e-2 in float16 and 3e-2 in bfloat16. Where activations are rounded, any is allowed by
            default that leaves a signal-to-noise ratio of 20 dB.
        opset: version of ONNX's operators, for ``onnx`` and ``openvino``.
        half: whether to write weights and to compute in float16; inputs and outputs stay what they are.

    Returns:
        The check; its score is for the caller to fill in.

    Raises:
        ExportError: there is no such format, or the model cannot be exported, or the file does not answer as the model.
    """
    kind = _format(format)
    if opset is not None and not kind.opset:
        raise ExportError(f"{format} has no opset: leave it out")
    if not kind.runs and (batches or tolerance is not None):
        raise ExportError(f"{format} cannot be run on this system, only written: leave batches and tolerance out")
    if half and kind.prepare is None and is_quantized(model):
        raise ExportError("activations of this model are rounded, which float16 is too coarse for: leave half out")
    inputs = inputs.on(model)
    settings: dict[str, Any] = {}
    if kind.prepare is not None:
        plain, settings = kind.prepare(model, half)
    else:
        whole = Halved(model) if half else model
        plain, marks = marked(whole) if kind.whole else (released(whole), {})
        settings = {"marks": marks} if kind.whole else {}
        settings |= {"opset": opset} if kind.opset else {}
    wide = () if half or kind.prepare is not None else _widened(model, kind.narrow)
    tolerance = TOLERANCES[torch.float16] if half and tolerance is None else tolerance
    real = [given.on(model) for given in batches or ()]
    same_size = [given for given in real if given.batch_size == inputs.batch_size]
    made_up = [varied(inputs, size) for size in (1, inputs.batch_size + 2)]

    with draft(path) as file:

        def held(answering: nn.Module, given: Sequence[Inputs]) -> Check:
            found = check(model, answering, given, format=format, path=file, tolerance=tolerance)
            more = wide
            if is_quantized(model) and (ratio := min(found.signal_to_noise_db, default=MOST_DB)) < USUAL_DB:
                more = (
                    f"only {ratio:.0f} dB of signal to noise from the model's answers, where {USUAL_DB:g} are usual",
                )
            if kind.as_it_runs is not None and any(isinstance(mark, Weight) for mark in settings["marks"].values()):
                more += _otherwise(answering, kind.as_it_runs(file), inputs, kind.runtime)
            return replace(found, notes=(*notes, *more))

        program = capture(plain, inputs, dynamic_batch=dynamic_batch and not kind.fixed)
        notes = kind.write(program, file, **settings)
        if not kind.runs:
            return Check(format, file.name, _bytes(file), None, notes=notes)
        answering = kind.load(file)
        if not has_dynamic_batch(program):
            found = held(answering, [inputs, *same_size])
            if dynamic_batch and kind.fixed:
                warn_fixed(model, inputs, kind.fixed)
            return found
        try:
            return held(answering, [inputs, *real, *made_up])
        except ExportError as error:
            kind.write(capture(plain, inputs, dynamic_batch=False), file, **settings)
            found = held(kind.load(file), [inputs, *same_size])
            warn_fixed(model, inputs, first_line(error))
            return found


class Halved(nn.Module):
    """A copy of a model in float16, whose inputs and answers are what they were.

    Args:
        model: which stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(released(model)).half().eval()
        self.kind = batch.dtype_of(model) or torch.float32

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer, computed in float16."""
        given = pytree.tree_map(partial(_cast, torch.float16), (args, kwargs))
        return pytree.tree_map(partial(_cast, self.kind), self.model(*given[0], **given[1]))


def _cast(kind: torch.dtype, value: Any) -> Any:
    return value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() else value


def runs(format: str) -> bool:
    """Whether files of a format can be run on this system.

    Raises:
        ExportError: there is no such format.
    """
    return _format(format).runs


def opened(format: str, path: str | os.PathLike[str]) -> nn.Module:
    """An exported file as a module that runs it, for whatever asks a model, such as a task's `evaluate`.

    Raises:
        ExportError: there is no such format, or its runtime is not here or cannot run the file.
    """
    return _format(format).load(Path(path))


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
    by_energy = tolerance is None and is_quantized(model)
    allowed = TOLERANCES.get(batch.dtype_of(model) or torch.float32, 1e-3) if tolerance is None else tolerance
    worst, signal, noise = 0.0, list[float](), list[float]()
    for inputs in batches:
        with torch.no_grad(), batch.mode(model, training=False):
            expected = _answer(model, inputs, type(model).__name__)
            given = _answer(file_model, inputs, path.name)
        found = difference(given, expected)
        here = energies(given, expected)
        if by_energy:
            db = min((decibels(*pair) for pair in here), default=MOST_DB)
            if not db >= LEAST_DB:
                raise ExportError(
                    f"{path.name} does not answer as {type(model).__name__} on {inputs}: the signal-to-noise ratio is "
                    f"{db:.1f} dB, where {LEAST_DB:g} dB are asked for{HINTS.get(format, '')}"
                )
        elif not found <= allowed:
            raise ExportError(
                f"{path.name} does not answer as {type(model).__name__} on {inputs}: "
                f"they differ by {found:.2g} of the largest answer, where {allowed:.2g} is allowed"
            )
        worst = max(worst, found)
        signal = [a + b for a, (b, _) in zip(signal or [0.0] * len(here), here, strict=True)]
        noise = [a + b for a, (_, b) in zip(noise or [0.0] * len(here), here, strict=True)]
    ratios = tuple(decibels(s, n) for s, n in zip(signal, noise, strict=True))
    return Check(format, path.name, _bytes(path), worst, signal_to_noise_db=ratios, runtime=_format(format).runtime)


def _widened(model: nn.Module, narrow: Sequence[str]) -> tuple[str, ...]:
    """What a user should know of weights of a floating-point type that a file has in more bits."""
    found = {constraints_on(module, tensor)[-1] for _, module, tensor in constrained_tensors(model)}
    types = sorted({one.form.type for one in found if isinstance(one, Floating)} - set(narrow))
    return (f"weights of type {', '.join(types)} are written in the model's own type",) if types else ()


def _otherwise(file: nn.Module, as_it_runs: nn.Module, inputs: Inputs, runtime: str) -> tuple[str, ...]:
    """What a user should know where a runtime, left to itself, answers `inputs` otherwise than the file says."""
    with torch.no_grad():
        given, expected = inputs.into(as_it_runs), inputs.into(file)
    if (found := difference(given, expected)) <= NOT_ROUNDED:
        return ()
    ratio = min((decibels(*pair) for pair in energies(given, expected)), default=MOST_DB)
    note = (
        f"left to itself, {runtime} rounds what goes into Linear layers with compressed weights to 8 bits, here off by "
        f"{found:.2g} of the largest answer ({ratio:.0f} dB of signal to noise); checked, and measured, with "
        "DYNAMIC_QUANTIZATION_GROUP_SIZE=0, which keeps it in floating point"
    )
    return (note,)


def _bytes(path: Path) -> int:
    """The size of a file with what belongs to it, or of a package."""
    # Where ONNX keeps what is too large for one file, and OpenVINO all weights.
    beside = (path.with_name(f"{path.name}.data"), *((path.with_suffix(".bin"),) if path.suffix == ".xml" else ()))
    files = path.rglob("*") if path.is_dir() else (path, *beside)
    return sum(file.stat().st_size for file in files if file.is_file())


def energies(a: Any, b: Any) -> list[tuple[float, float]]:
    """Of every output, the energy of the answers `b`, Σ b², and that of what `a` is off, Σ (a − b)²; finite ones only.

    Args:
        a, b: tensors, or any nesting of them, of the same shapes.
    """
    pairs = zip(batch.tensors_in(a), batch.tensors_in(b), strict=True)
    found = []
    for x, y in ((x.detach().cpu().double(), y.detach().cpu().double()) for x, y in pairs):
        counted = x.isfinite() & y.isfinite()
        x, y = x[counted], y[counted]
        found.append((float(y.square().sum()), float((x - y).square().sum())))
    return found


def decibels(signal: float, noise: float) -> float:
    """A ratio of energies in dB, at most 200: that is what equal answers have."""
    if noise <= signal * 10 ** (-MOST_DB / 10):
        return MOST_DB
    return 10 * math.log10(signal / noise) if signal else -MOST_DB


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


def _format(name: str) -> Format:
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise ExportError(f"there is no format {name!r}{did_you_mean(name, FORMATS)}; there are {known}")
    return FORMATS[name]


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
