"""Static quantization: ranges of activations are found on a few dozen samples, and stay.

Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, 2018,
arxiv.org/abs/1712.05877; Nagel et al., A white paper on neural network quantization, 2021, arxiv.org/abs/2106.08295,
whose post-training pipeline this follows: fold batch norms, add quantizers, set the ranges of weights and activations,
correct biases.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from featherweight.edits import Edit, Fold, Quantize
from featherweight.graph import ModelGraph
from featherweight.layers import PerLayer
from featherweight.quantize.activations import (
    Activations,
    check_folded,
    correct_biases,
    leave,
    norms_of,
    observe,
    quantized,
    round_biases,
    scales_read,
    seen_edges,
    told_apart,
)
from featherweight.quantize.placement import place
from featherweight.study import Study
from featherweight.task import Task


@dataclass(frozen=True)
class Static(Activations):
    """Round weights and activations to whole numbers, with ranges found on calibration data; nothing is trained.

    The model is kept as its graph from then on. Weights of fewer bits than 8 take so many in an exported file, and are
    widened to 8 by the runtime; activations of other widths than 8 are computed with in float32 by ONNX Runtime, and
    those of 16 by OpenVINO too. Biases are rounded as integer kernels have them, in steps of the two scales' product.

    Attributes:
        activation_bits: of the activations, 2 to 8 or 16: for all, or by pattern of their names; 8 for the others.
        activation_symmetric: whether activations are signed and have no zero point: for all, or by pattern of their
            names. None, and values that no pattern names: as the target has it.
        ranges: of activations: ``"mse"`` (least squared error), ``"min-max"``, ``"average"`` (a running average of
            batches), ``"percentile"`` (99.99 % of the values) or ``"entropy"`` (least divergence); for all, or by
            pattern of their names, ``"mse"`` for the others.
        correct_biases: whether biases take up what rounding does to the means of layers' outputs, where there is
            calibration data.
        samples: how many calibration samples to look at.
        fold: whether batch norms are folded into the layers in front of them first.
    """

    activation_bits: PerLayer[int] = 8
    activation_symmetric: PerLayer[bool] | None = None
    ranges: PerLayer[Literal["mse", "min-max", "average", "percentile", "entropy"]] = "mse"
    correct_biases: bool = True
    samples: int = 64
    fold: bool = True

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if not found and self.samples < 1:
            found.append("samples must be at least 1")
        return found

    def rounded(self, study: Study, graph: ModelGraph) -> Iterator[Edit]:
        """Fold, place, watch, round."""
        able, norms_left = self._norms(graph)
        if able:
            before = copy.deepcopy(graph)
            yield Fold(tuple(able))
            check_folded(study, before)
        placement = place(graph, self.runtime(), self.refused)
        observers = observe(study, placement, self.samples, self.ranges)
        edges, unseen = seen_edges(placement, observers)
        yield from leave({**self.reasons(study, placement), **norms_left, **unseen})
        corrects = self.correct_biases and study.task.has_calibration
        before = copy.deepcopy(graph) if corrects else graph
        made = quantized(self, edges, observers, self.activation_bits, self.activation_symmetric, self.ranges)
        yield made
        study.notes.append(made.describe())
        yield from self.weights(study, placement, scales_read(graph, placement))
        if corrects:
            correct_biases(study, placement, before)
        round_biases(graph, placement)

    def _norms(self, graph: ModelGraph) -> tuple[list[str], dict[str, str]]:
        """Batch norms that are folded, which changes no answer; and those that stay, with the reason."""
        able, left = norms_of(graph)
        if not self.fold:
            return [], left
        exact, turned = told_apart(graph, able)
        return exact, left | turned

    def each_alone(self, study: Study, widths: Sequence[int]) -> tuple[dict[str, list[Quantize]], dict[str, str]]:
        """What rounds every activation that the step would round, that one alone, to each of some widths.

        Args:
            study: of the network as a graph; its batch norms are folded, as the step does it.
            widths: in bits.
        Returns:
            Edits by the value's name in calling order, one for every width; and what stays as it is, with the reason.
        """
        graph = study.model
        assert isinstance(graph, ModelGraph)
        able, norms_left = self._norms(graph)
        if able:
            Fold(tuple(able)).apply(graph)
        placement = place(graph, self.runtime(), self.refused)
        observers = observe(study, placement, self.samples, self.ranges)
        edges, unseen = seen_edges(placement, observers)
        found = {
            name: [
                quantized(self, {name: edge}, observers, bits, self.activation_symmetric, self.ranges)
                for bits in widths
            ]
            for name, edge in edges.items()
        }
        return found, {**self.reasons(study, placement), **norms_left, **unseen}
