"""The ledger: what each step did, before and after. Plain data; every report is a function of it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from featherweight.errors import ArtifactError
from featherweight.files import read_json

Record = TypeVar("Record")


@dataclass(frozen=True)
class Row:
    """One layer, or the whole network, priced.

    Attributes:
        macs: multiply-accumulates of one call on the task's example.
        params: number of parameters.
        bytes: bytes of its parameters and buffers as they are stored.
        activation_bytes: bytes its operations write.
        energy_joules: an estimate, from published energies per operation.
        kind: the layer's class, empty for the whole network.
    """

    macs: int
    params: int
    bytes: int
    activation_bytes: int
    energy_joules: float
    kind: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A network at one moment of a recipe.

    Attributes:
        score: what the task's evaluate said, higher is better; None where it was not asked.
        total: the whole network's cost.
        layers: every layer's cost, in the order the layers are first called.
        peak_activation_bytes: most bytes of activations alive at once.
        uncounted: what the costs leave out, by name.
    """

    score: float | None
    total: Row
    layers: Mapping[str, Row]
    peak_activation_bytes: int
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """One option of one layer.

    Attributes:
        setting: the option in a few words, such as ``rank 12``; ``as it is`` for the layer unchanged.
        share: its cost as a share of the layer's own, in the metric the choice was made by.
        predicted_loss: predicted rise of the loss, in the curvature's units; None where not predicted.
        score: measured score of the network with only this layer changed; None where not measured.
    """

    setting: str
    share: float
    predicted_loss: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen for one layer, and among what.

    Attributes:
        chosen: the chosen option.
        curve: the options it was chosen from, by rising cost (thinned where there were very many).
    """

    chosen: Point
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Entry:
    """What one step did.

    Attributes:
        step: the step as recipes write it, such as ``factorize.SpatialSVD``.
        settings: its settings that differ from the defaults.
        edits: the edits it made, as JSON objects.
        left: layers left as they were, with the reason.
        before, after: the network around the step.
        plan: the form chosen for every layer that is replaced, as JSON objects by layer.
        choices: per layer, what was chosen, and among what; empty for a step that chooses nothing.
        metric: the cost that `Point.share` is a share of, such as ``macs``.
        selected_by: ``optimal``, ``greedy``, ``manual``, or empty.
        evaluations: how often the task's evaluate ran for this step.
        seconds: wall time of the step.
        notes: what the user should know, a sentence each.
    """

    step: str
    settings: Mapping[str, Any]
    edits: tuple[Mapping[str, Any], ...]
    left: Mapping[str, str]
    before: Snapshot
    after: Snapshot
    plan: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choices: Mapping[str, Choice] = field(default_factory=dict)
    metric: str = "macs"
    selected_by: str = ""
    evaluations: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Latency of one network in one runtime, in milliseconds a call: the median and the quartiles of the repeats.

    Attributes:
        network: ``before`` or ``after``.
        runtime: such as ``torch`` or ``onnxruntime``.
    """

    network: str
    runtime: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    repeats: int
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Check:
    """An exported file held against the PyTorch model.

    Attributes:
        format: such as ``onnx``.
        file: the file's name.
        bytes: its size on disk.
        difference: greatest relative difference of any output: max|a − b| / max|b|; None where the file was not run.
        score: the task's score of the file in its runtime, where it could be asked.
        signal_to_noise_db: of every output, ``10 · log10(Σ b² / Σ (a − b)²)``, at most 200.
        runtime: where the file was run, such as ``onnxruntime``; empty where it was not.
        integer_operations: how many of the operations that multiply its runtime computes on whole numbers.
        operations: how many operations multiply there.
        in_float: those that it computes in floating point, by kind.
        latency_ms: median time of a call there, and of the original in float32 and in bfloat16 in the same runtime.
        float32_ms, bfloat16_ms: None where not measured.
        notes: what the user should know, a sentence each.
    """

    format: str
    file: str
    bytes: int
    difference: float | None
    score: float | None = None
    signal_to_noise_db: tuple[float, ...] = ()
    runtime: str = ""
    integer_operations: int | None = None
    operations: int | None = None
    in_float: tuple[str, ...] = ()
    latency_ms: float | None = None
    float32_ms: float | None = None
    bfloat16_ms: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """All that was done to one model.

    Attributes:
        model: the original's class name.
        fingerprint: hash of the original's form and values.
        scored_by: what the scores are, such as ``evaluate`` or ``agreement with the original (top-1)``.
        steps: an entry a step, in order.
        timings, checks: what was measured on the result, added as it is measured.
        file_bytes: sizes of saved files by name.
        machine, versions, created: where, with what, when.
    """

    model: str
    fingerprint: str
    scored_by: str
    steps: tuple[Entry, ...] = ()
    timings: tuple[Timing, ...] = ()
    checks: tuple[Check, ...] = ()
    file_bytes: Mapping[str, int] = field(default_factory=dict)
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def before(self) -> Snapshot:
        """The network before the first step."""
        return self.steps[0].before

    @property
    def after(self) -> Snapshot:
        """The network after the last step."""
        return self.steps[-1].after

    def to_json(self) -> dict[str, Any]:
        """The ledger as JSON-ready dicts, lists, numbers and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        """The ledger back from `to_json`.

        Raises:
            ArtifactError: a field is missing or not a ledger's.
        """
        try:
            steps = tuple(
                _record(
                    Entry,
                    entry,
                    edits=tuple(entry["edits"]),
                    before=_snapshot(entry["before"]),
                    after=_snapshot(entry["after"]),
                    choices={name: _choice(choice) for name, choice in entry["choices"].items()},
                    notes=tuple(entry["notes"]),
                )
                for entry in data["steps"]
            )
            timings = tuple(_record(Timing, t) for t in data["timings"])
            checks = tuple(_check(c) for c in data["checks"])
            return _record(cls, data, steps=steps, timings=timings, checks=checks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"this is not a ledger of this version: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ledger as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read a ledger that `save` wrote.

        Raises:
            ArtifactError: the file cannot be read, is not JSON, or not a ledger.
        """
        return read_json(path, "a ledger", cls.from_json)


def machine() -> str:
    """This machine in a few words: processor architecture, operating system and number of cores."""
    return f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores"


def _record(kind: type[Record], data: Mapping[str, Any], **parsed: Any) -> Record:
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := set(data) - known:
        raise TypeError(f"{kind.__name__} has no {sorted(unknown)}")
    return kind(**{**data, **parsed})


def _snapshot(data: Mapping[str, Any]) -> Snapshot:
    layers = {name: _record(Row, row) for name, row in data["layers"].items()}
    return _record(Snapshot, data, total=_record(Row, data["total"]), layers=layers, uncounted=tuple(data["uncounted"]))


def _check(data: Mapping[str, Any]) -> Check:
    several = {name: tuple(data.get(name, ())) for name in ("signal_to_noise_db", "in_float", "notes")}
    return _record(Check, data, **several)


def _choice(data: Mapping[str, Any]) -> Choice:
    return Choice(_record(Point, data["chosen"]), tuple(_record(Point, p) for p in data["curve"]))
