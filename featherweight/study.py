"""What is known of a model while a step works on it: its costs, its scores, its curvature."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import nn

from featherweight.batch import Inputs, copied, mode
from featherweight.cost.cost import Cost
from featherweight.cost.count import Profile, profile
from featherweight.cost.latency import Latency
from featherweight.curvature.gram import Statistics, classifier_loss, gather, my_share, regression_loss
from featherweight.curvature.lockstep import Lockstep
from featherweight.curvature.products import apart, multiplied
from featherweight.edits import Edit
from featherweight.forms import Layer, attention_of
from featherweight.score import Scorer, class_dimension
from featherweight.task import Task

# Of a network, an example and a runtime: a function that times another network there, in turn with this one, and gives
# the other's latency and this one's.
Beside: TypeAlias = Callable[[nn.Module, Inputs, str], Callable[[nn.Module], tuple[Latency, Latency]]]


@dataclass
class Study:
    """A model on the bench.

    Attributes:
        model: the network the step works on and changes; never the caller's own.
        original: the network as it was before the step, for reference; not changed.
        task: what the model is for.
        scorer: asks for scores, and counts.
        start: what the recipe's original costs: shares of a budget are shares of this.
        seed: of everything random.
        store: file of evaluations that outlive the run; None to keep them in memory.
        notes: what the step wants the user to know, a sentence each.
        findings: what the step wants in the ledger beside its edits, by field of the ledger's entry.
        worked_out: what the step has found out when it was checked, and need not find out again.
        given: the network that the recipe was given, the caller's own: to be copied, never to be run or changed.
        trained: whether the step has changed values that no edit tells of, as training does.
        made: the edits of earlier steps, which a file of the model begins with.
        beside: times networks in a runtime, for limits of latency; None where there are none.
    """

    model: nn.Module
    original: nn.Module
    task: Task
    scorer: Scorer
    start: Cost
    seed: int = 0
    store: str | None = None
    notes: list[str] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    worked_out: dict[str, Any] = field(default_factory=dict)
    given: nn.Module | None = None
    trained: bool = False
    made: tuple[Edit, ...] = ()
    beside: Beside | None = None

    def again(self) -> Study:
        """A study of the model as it has become, for a step that works in rounds; notes and findings go on."""
        reference = copied(self.model)
        return replace(self, original=reference, worked_out={})

    @cached_property
    def profile(self) -> Profile:
        """The original's costs, layer by layer."""
        return profile(self.original, self.task.inputs())

    @cached_property
    def original_score(self) -> float:
        """The original's score."""
        return self.scorer(self.original)

    def statistics(self, layers: Mapping[str, Layer], samples: int, gradients: bool) -> dict[str, Statistics]:
        """Second moments of the original's layers on the calibration data.

        Where gradients cannot be had (an operation without a derivative), that is noted and inputs alone are watched.

        Args:
            layers: which layers, by name.
            samples: how many calibration samples to look at.
            gradients: whether to watch the gradients too, of the divergence from the model's own answers.
        """
        if gradients:
            try:
                batches = self.task.batches(self.original, samples)
                return gather(self.original, layers, batches, gradients=self.probe(), seed=self.seed)
            except (RuntimeError, NotImplementedError) as error:
                self.notes.append(
                    f"the loss has no gradient here ({str(error).splitlines()[0]}): "
                    "layers were weighed by their own output's error"
                )
        return gather(self.original, layers, self.task.batches(self.original, samples), seed=self.seed)

    def unread(self, names: Collection[str]) -> dict[str, str]:
        """Which of attention's projections nothing is known of, with the reason.

        Args:
            names: of layers; of others than attention's projections nothing is said.
        """
        wanted = [name for name in names if attention_of(self.original, name) is not None]
        if not wanted:
            return {}
        found = multiplied(self.original, wanted, self.task.inputs().on(self.original))
        reasons = {name: "the example never multiplies by it" for name in wanted if name not in found}
        if self.task.has_calibration:
            mixed = "calls of its attention multiply different parts of it at once: no one set of inputs is each part's"
            reasons |= {name: mixed for name, rows in found.items() if not apart(rows)}
        return reasons

    def lockstep(self, model: nn.Module, samples: int) -> Lockstep:
        """The original and a model that is to be fitted to it, layer by layer, side by side on the calibration data."""
        held, batch = self.profile.held_bytes, self.task.inputs().batch_size
        return Lockstep(
            self.original,
            model,
            my_share(self.task.batches(model, samples)),
            sample_bytes=lambda name: held.get(name, self.profile.peak_activation_bytes) / batch,
        )

    def probe(self) -> Any:
        """A function (outputs, generator) → scalar whose gradients' covariance is the curvature of the divergence."""
        with torch.no_grad(), mode(self.original, training=False):
            outputs = self.task.inputs().on(self.original).into(self.original)
        dim = class_dimension(outputs, self.task.loss)
        return regression_loss if dim is None else classifier_loss(dim)
