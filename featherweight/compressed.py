"""The result of a recipe: the model, what made it, and everything that is done with it afterwards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight import artifact
from featherweight.batch import Inputs, as_inputs, copied, sketch, sketched
from featherweight.code.tensors import Coding
from featherweight.cost.latency import measure, torch_run
from featherweight.edits import Edit
from featherweight.errors import ExportError
from featherweight.export import export as export_file
from featherweight.export.compiled import CompiledModel, compiled
from featherweight.export.executorch import ExecuTorchModel
from featherweight.export.onnx import session
from featherweight.export.verify import opened, runs
from featherweight.export.worth import available, file_name, measured
from featherweight.ledger import Check, Ledger, Timing
from featherweight.report import write
from featherweight.report.table import text
from featherweight.score import Scorer
from featherweight.search.budget import Budget
from featherweight.search.options import Plan
from featherweight.task import Task


@dataclass
class Compressed:
    """A compressed model with its record.

    Attributes:
        model: an ordinary nn.Module: it trains, copies, compiles and exports.
        edits: what gave it its form, in order.
        ledger: what each step did; grows with what is measured here.
        example: inputs of one call: the task's, or made-up ones of the same shapes for a model that was loaded.
    """

    model: nn.Module
    edits: Sequence[Edit]
    ledger: Ledger
    example: Inputs

    @property
    def plan(self) -> Plan:
        """What was made of every layer, as a plan to edit and to run again; of the last step that replaced layers."""
        return ([plan for _, plan in plans(self.ledger)] or [Plan("")])[-1]

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        ledger: bool | None = None,
        coding: Coding = "small",
        fold: bool = False,
    ) -> int:
        """Write the model to one file, and return its size in bytes.

        Args:
            path: where to.
            ledger: whether the record goes into the file too; it may be as large as a small network. By default it does
                unless the file is then larger than the bytes that a `quantize.RateDistortion` was asked for.
            coding: ``small`` for the least bytes, as far as they are worth their time; ``fast``; ``huffman``, as Deep
                Compression has it, to compare with.
            fold: take the statistics of batch norms into their weights, which makes the file smaller. In evaluation
                mode the answers stay the same up to rounding; a model that is to be trained on is better left as it is.
        Raises:
            ArtifactError: the file cannot be written; what was there before is still there.
        """
        limit = _byte_limit(self.ledger) if ledger is None else None
        options: dict[str, Any] = {"coding": coding, "fold": fold}
        whole = (self.model, self.edits, None if ledger is False else self.ledger, sketch(self.example))
        if limit is not None and artifact.measured(*whole, **options) > limit:
            whole = (self.model, self.edits, None, sketch(self.example))
        size = artifact.save(path, *whole, **options)
        self._add(file_bytes={**self.ledger.file_bytes, Path(path).name: size})
        return size

    def export(
        self,
        format: str,
        path: str | os.PathLike[str],
        batches: Sequence[Any] | None = None,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        dynamic_batch: bool = True,
        tolerance: float | None = None,
        opset: int | None = None,
        half: bool = False,
    ) -> Check:
        """Write the model for a runtime, run the file there, and hold its answers against the model's.

        Args:
            format: ``onnx``, ``openvino``, ``executorch``, ``coreml`` or ``torch_export``.
            path: the file to write.
            batches: real inputs to compare on, beside the example and made-up ones.
            evaluate: the task's, to score the file in its runtime: it is called with a module that runs the file.
            dynamic_batch: whether the file takes batches of any size.
            tolerance: greatest difference allowed, as a share of the largest answer; by the model's type by default.
            opset: version of ONNX's operators, for ``onnx`` and ``openvino``.
            half: whether to write weights and to compute in float16.
        Raises:
            ExportError: it cannot be exported, or the file does not answer as the model does.
        """
        options = {"dynamic_batch": dynamic_batch, "tolerance": tolerance, "opset": opset, "half": half}
        given = [as_inputs(batch, like=self.example) for batch in batches or ()]
        if evaluate is not None and not runs(format):
            raise ExportError(f"{format} cannot be run on this system, only written: leave evaluate out")
        check = export_file(self.model, self.example, format, path, given, **options)  # type: ignore[arg-type]
        if evaluate is not None:
            check = replace(
                check, score=Scorer(Task(self.example, evaluate=evaluate), self.model)(opened(format, path))
            )
        self._add(checks=(*self.ledger.checks, check))
        return check

    def compiled(self) -> CompiledModel:
        """The model compiled by torch.compile for inputs of the example's shapes, its whole numbers multiplied as such.

        Raises:
            ExportError: it cannot be compiled here, or answers otherwise when it is.
        """
        return compiled(self.model, self.example)

    def verify(
        self,
        original: nn.Module,
        folder: str | os.PathLike[str],
        *,
        formats: str | Sequence[str] | None = None,
        batches: Sequence[Any] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        repeats: int = 50,
    ) -> tuple[Check, ...]:
        """Export for every runtime that is here, and see what the files are worth: agreement, kernels, time, bytes.

        In each runtime the file is timed against the original in float32, and in bfloat16 where the processor and the
        runtime have it, in turn. A file that is not faster gets a note that says so. A format that fails has a check of
        no bytes with the reason in its notes, as long as another works.

        Args:
            original: the model before.
            folder: where to write the files: ``model.onnx``, ``model.xml``, ``model.pte``.
            formats: of ``onnx``, ``openvino`` and ``executorch``, which (or one); None for those whose runtime is here.
            batches: real inputs to compare on, beside the example and made-up ones.
            evaluate: the task's, to score every file in its runtime.
            repeats: timed calls of each.
        Returns:
            The checks, which the ledger holds from then on.
        Raises:
            ExportError: no runtime is here, there is no such format, or every format failed.
        """
        names = available() if formats is None else (formats,) if isinstance(formats, str) else tuple(formats)
        if not names:
            raise ExportError("there is no runtime to verify in: pip install 'featherweight[onnx]' or '[openvino]'")
        paths = {name: Path(folder) / file_name(name) for name in names}
        earlier, checks, failed = self.ledger.checks, list[Check](), list[ExportError]()
        for name, path in paths.items():
            try:
                check = self.export(name, path, batches, evaluate=evaluate)
                checks.append(measured(check, original, path, self.example, repeats))
            except ExportError as error:
                failed.append(error)
                checks.append(Check(name, path.name, 0, None, notes=(f"not verified: {error}",)))
        self._add(checks=earlier if len(failed) == len(checks) else (*earlier, *checks))
        if len(failed) == len(checks):
            raise failed[0] if len(failed) == 1 else ExportError("no format works: " + "; ".join(map(str, failed)))
        return tuple(checks)

    def time(
        self, original: nn.Module, runtimes: Sequence[str] = ("torch", "onnxruntime"), repeats: int = 50
    ) -> tuple[Timing, ...]:
        """Measure the latency of the original and of this model, interleaved, on the example.

        Args:
            original: the model before.
            runtimes: of ``torch``, ``onnxruntime`` and ``executorch``, which.
            repeats: timed calls of each.
        """
        timings = time_side_by_side(original, self.model, self.example, runtimes, repeats)
        self._add(timings=timings)
        return timings

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write the report: .html, .md or .json."""
        write(self.ledger, path)

    def __str__(self) -> str:
        return text(self.ledger)

    def _add(self, **fields: Any) -> None:
        self.ledger = replace(self.ledger, **fields)


def _byte_limit(ledger: Ledger) -> float | None:
    """The bytes that a step was asked to make the whole file of; None where none was."""
    for entry in reversed(ledger.steps):
        if entry.step == "quantize.RateDistortion" and "bytes" in (budget := entry.settings.get("budget", {})):
            return Budget(**budget).limits({"bytes": ledger.before.total.bytes}).get("bytes")
    return None


def plans(ledger: Ledger) -> list[tuple[int, Plan]]:
    """The plan of every step that chose something, with the step's number from 1."""
    chosen = [(n, e) for n, e in enumerate(ledger.steps, start=1) if e.choices]
    return [(n, Plan.from_json({"step": entry.step, "layers": entry.plan})) for n, entry in chosen]


def load(path: str | os.PathLike[str], into: nn.Module, *, dense: bool = False) -> Compressed:
    """A compressed model from its file, in a copy of a freshly made model.

    Args:
        path: what `Compressed.save` wrote.
        into: the model as it was before compression, such as ``make_model()``; its values do not matter, and it is not
            changed.
        dense: give plain weights. By default masks, grids and tables are there as they were, for further training.
    Raises:
        ArtifactError: the file is missing, foreign, newer, truncated or damaged, or is another model's.
    """
    model, edits, ledger, example = artifact.load(path, copied(into), dense)
    return Compressed(model.eval(), edits, ledger, sketched(example))


def time_side_by_side(
    original: nn.Module,
    compressed: nn.Module,
    example: Inputs,
    runtimes: Sequence[str] = ("torch", "onnxruntime"),
    repeats: int = 50,
) -> tuple[Timing, ...]:
    """Latency of two networks in each runtime, all of them interleaved so that drift hits all alike.

    Raises:
        ExportError: there is no such runtime, or a model cannot be exported for it.
    """
    networks: Mapping[str, nn.Module] = {"before": original, "after": compressed}
    if unknown := set(runtimes) - {"torch", "onnxruntime", "executorch"}:
        raise ExportError(f"there is no runtime {sorted(unknown)}: there are torch, onnxruntime and executorch")
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, model in networks.items():
            inputs = example.on(model)
            if "torch" in runtimes:
                runs[f"{name} torch"] = torch_run(model, inputs)
            if "onnxruntime" in runtimes:
                export_file(model, inputs, "onnx", Path(folder) / f"{name}.onnx")
                runs[f"{name} onnxruntime"] = partial(inputs.into, session(Path(folder) / f"{name}.onnx"))
            if "executorch" in runtimes:
                export_file(model, inputs, "executorch", Path(folder) / f"{name}.pte", dynamic_batch=False)
                runs[f"{name} executorch"] = partial(inputs.into, ExecuTorchModel(Path(folder) / f"{name}.pte"))
        measured = measure(runs, repeats=repeats)
    threads, size = torch.get_num_threads(), example.batch_size
    return tuple(
        Timing(network, runtime, taken.median_ms, taken.lower_ms, taken.upper_ms, taken.repeats, size, threads)
        for (network, runtime), taken in ((label.split(), taken) for label, taken in measured.items())
    )
