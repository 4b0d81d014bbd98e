"""Weight-only quantization, with as much work on the rounding as is wanted or needed.

From the cheapest to the dearest: rounding to the nearest value of a grid of least error; equalizing the channels
between layers first and correcting biases (Nagel et al., Data-free quantization through weight equalization and bias
correction, 2019, arxiv.org/abs/1906.04721); GPTQ; AdaRound; learning the rounding block by block (BRECQ).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import Tensor, nn

from featherweight.curvature.gram import Statistics
from featherweight.curvature.sweeps import Matrix
from featherweight.edits import Constrain, Edit
from featherweight.errors import DropExceeded
from featherweight.forms import Layer
from featherweight.layers import for_layer
from featherweight.layerwise import Jointly
from featherweight.ledger import Snapshot
from featherweight.quantize.adaround import AdaRound
from featherweight.quantize.brecq import BRECQ
from featherweight.quantize.equalization import equalize
from featherweight.quantize.gptq import GPTQ
from featherweight.quantize.rounding import Lattice, Rounding
from featherweight.search.options import Option, Plan
from featherweight.study import Study
from featherweight.task import Task

EFFORTS = ("nearest", "equalized", "gptq", "adaround", "blocks")


@dataclass(frozen=True)
class Weights(Rounding):
    """Store weights in fewer bits; activations stay as they are.

    With `bits` and a budget of a drop alone, efforts are tried in turn up to the one given, until the score falls no
    further than that; the best is kept, with a `DropExceeded` warning where even that falls further.

    Attributes:
        effort: how weights are rounded: ``"nearest"``, ``"equalized"`` (the same with channels equalized between layers
            and biases corrected), ``"gptq"``, ``"adaround"`` or ``"blocks"`` (as BRECQ). Per layer where it is a
            mapping, in which the two that work on several layers at once have no place; layers that it does not name
            get ``"gptq"``.
    """

    effort: (
        Literal["nearest", "equalized", "gptq", "adaround", "blocks"]
        | Mapping[str, Literal["nearest", "gptq", "adaround"]]
    ) = "gptq"

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if not found and self.escalates and isinstance(self.effort, Mapping):
            found.append(
                "effort differs by layer, and with bits and a drop alone efforts are tried in turn for all layers: "
                "give one effort, the last to try"
            )
        return found

    def at(self, name: str) -> Self:
        effort: Any = for_layer(self.effort, name, "gptq")
        return replace(super().at(name), effort=effort)

    def ways(self) -> dict[str, Any]:
        return {**super().ways(), **({"budget": None} if self.escalates else {})}

    @property
    def escalates(self) -> bool:
        """Whether efforts are tried in turn."""
        return self.bits is not None and self.budget is not None and not self.budget.costs()

    @property
    def corrects_bias(self) -> bool:
        return self.effort != "nearest"

    def known(self, layer: Layer, seen: Statistics | None) -> Matrix:
        nearest = self.effort in ("nearest", "equalized")  # which leave what to round to as it is
        return super().known(layer, replace(seen, cross=None) if seen is not None and nearest else seen)

    def rounded(self, of: Matrix, lattice: Lattice) -> Tensor:
        match self.effort:
            case "nearest" | "equalized":
                return lattice.nearest(of.weight)
            case "adaround":
                return AdaRound().rounded(of, lattice)
            case _:
                return GPTQ().rounded(of, lattice)

    def drafted(self, of: Matrix, lattice: Lattice) -> Tensor:
        return self.rounded(of, lattice) if self.effort in ("nearest", "equalized") else GPTQ().drafted(of, lattice)

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        if self.effort in ("nearest", "equalized"):
            return super().losses(layer, options, seen)
        return GPTQ(data_aware=self.data_aware, ranges=self.ranges).losses(layer, options, seen)

    def jointly(self, study: Study, plan: Plan, model: nn.Module) -> Jointly | None:
        if self.effort != "blocks":
            return None
        return BRECQ(data_aware=self.data_aware, samples=self.samples).jointly(study, plan, model)

    # In turn --------------------------------------------------------------------------------------------------------

    def check(self, study: Study) -> None:
        if not self.escalates:
            super().check(study)

    def planned(self, study: Study, before: Snapshot) -> Snapshot:
        return replace(self, budget=None).planned(study, before) if self.escalates else super().planned(study, before)

    def edits(self, study: Study) -> Iterator[Edit]:
        """Round layer after layer; or with one effort after the other, and then as the best of them did."""
        if self.escalates:
            yield from self._in_turn(study)
        elif self.effort == "equalized":
            pairs, reason = equalize(study.model, study.task.inputs())
            study.notes.append(
                f"{len(pairs)} pairs of layers were equalized" if pairs else f"nothing was equalized: {reason}"
            )
            yield from super().edits(study.again() if pairs else study)
        else:
            yield from super().edits(study)

    def _in_turn(self, study: Study) -> Iterator[Edit]:
        assert self.budget is not None
        assert self.budget.drop is not None
        best: tuple[float, str, Study, list[Edit]] | None = None
        scores: dict[str, float] = {}
        for effort in EFFORTS[: EFFORTS.index(str(self.effort)) + 1]:
            trial = replace(study, model=copy.deepcopy(study.original), notes=[], findings={}, worked_out={})
            done: list[Edit] = []
            for edit in replace(self, budget=None, effort=effort).edits(trial):  # type: ignore[arg-type]
                trial.model = edit.apply(trial.model)
                done.append(edit)
            scores[effort] = study.scorer(trial.model)
            if best is None or scores[effort] > best[0]:
                best = scores[effort], effort, trial, done
            if study.original_score - scores[effort] <= self.budget.drop:
                break
        assert best is not None
        score, effort, trial, done = best
        study.findings.update(trial.findings)
        tried = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        study.notes += [*trial.notes, f"scores by effort: {tried}; {effort} was kept"]
        if study.original_score - score > self.budget.drop:
            lost = study.original_score - score
            missed = f"no effort kept the drop within {self.budget.drop:g}: it is {lost:.4g}"
            study.notes.append(missed)
            warnings.warn(f"{self.name}: {missed}; give more bits or a larger drop", DropExceeded, stacklevel=6)
        # The trial's values come all at once: more than its edits hold were changed.
        yield from (replace(edit, values=None) if isinstance(edit, Constrain) else edit for edit in done)
        study.model.load_state_dict(trial.model.state_dict())
