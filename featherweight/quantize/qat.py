"""Quantization-aware training: the network is trained with its numbers rounded, and the steps of its grids with it.

The gradient passes straight through the rounding (Bengio et al., 2013, arxiv.org/abs/1308.3432). What is learned of
the grids: Esser et al., Learned step size quantization, 2020, arxiv.org/abs/1902.08153; Bhalgat et al., LSQ+, 2020,
arxiv.org/abs/2004.09576; Choi et al., PACT, 2018, arxiv.org/abs/1805.06085. Batch norms stay while it is trained, as in
these, behind the rounded weights; afterwards each is folded into its layer exactly, because a factor for every output
only makes another scale of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from featherweight.batch import mode, tensors_in
from featherweight.edits import Edit, Fold
from featherweight.errors import TaskError, first_few
from featherweight.forms import Masked, Rounded
from featherweight.forms.grid import Gridded
from featherweight.graph import ModelGraph, turn, value_names, weight_of
from featherweight.graph.rules.call import arguments
from featherweight.graph.trace import attribute
from featherweight.layers import PerLayer
from featherweight.mend import finetune
from featherweight.quantize.activations import (
    Activations,
    leave,
    norms_of,
    observe,
    on_weight,
    quantized,
    round_biases,
    scales_read,
    seen_edges,
    told_apart,
)
from featherweight.quantize.placement import outputs_axis, place
from featherweight.score import class_dimension, logits_of
from featherweight.study import Study
from featherweight.task import Task


@dataclass(frozen=True)
class QAT(Activations):
    """Round weights and activations, and train the network with them rounded, by ``task.train``.

    A step is learned by the logarithm of its growth, so that it stays positive, whatever its size and the optimizer:
    its gradient in proportion to it is LSQ's, with LSQ's factor 1 / √(values · greatest whole number), through a tanh,
    and one update of SGD moves it by no more, in proportion, than the learning rate. The offsets of LSQ+ are learned
    alike, in shares of the range that they began with, and rounded to whole zero points wherever they are used, as the
    kernels will have them. With loss scaling (fp16) that bound is lower by the scale.

    Attributes:
        activation_bits: of the activations, 2 to 8 or 16: for all, or by pattern of their names; 8 for the others.
        epochs: of training.
        learn: of the grids: ``"lsq"`` (every step), ``"lsq+"`` (steps, and the activations' offsets), ``"pact"``
            (where activations are cut off; weights' steps as in LSQ) or ``"nothing"`` (ranges stay as they were found).
        distill: train towards the answers of the network as it was before the step, and not by ``task.loss``: the
            divergence of classifiers' distributions, the squared error of other answers.
        temperature: of the distributions.
        activation_symmetric: as in `Static`.
        ranges: of activations, where the grids begin, as in `Static`; `weight_ranges` says it of weights.
        samples: how many calibration samples to look at for that.
    """

    activation_bits: PerLayer[int] = 8
    epochs: float = 1
    learn: Literal["lsq", "lsq+", "pact", "nothing"] = "lsq"
    distill: bool = False
    temperature: float = 1.0
    activation_symmetric: PerLayer[bool] | None = None
    ranges: PerLayer[Literal["mse", "min-max", "average", "percentile", "entropy"]] = "mse"
    samples: int = 64

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        if self.samples < 1 or self.epochs <= 0 or self.temperature <= 0:
            found.append("samples must be at least 1, and epochs and temperature more than 0")
        if task.train is None:
            found.append(
                "it needs Task(train=...), which the task does not have: without training, use quantize.Static"
            )
        return found

    def rounded(self, study: Study, graph: ModelGraph) -> Iterator[Edit]:
        """Place and round as static quantization does, train, fold."""
        able, norms_left = norms_of(graph)
        norms = [name for name in able if self._scaled_by(graph, name)]
        if early := [name for name in able if name not in norms]:
            yield Fold(tuple(early))
            study.notes.append(
                "folded before the training, for outputs without scales of their own could not take them up "
                f"afterwards: {', '.join(early)}"
            )
        # The lowest value of a grid has no opposite, should a batch norm turn its sign.
        turn(graph, [name for name in norms if all(isinstance(c, Masked) for c in on_weight(graph, name))])
        placement = place(graph, self.runtime(), self.refused, norms)
        observers = observe(study, placement, self.samples, self.ranges)
        edges, unseen = seen_edges(placement, observers)
        yield from leave({**self.reasons(study, placement), **norms_left, **unseen})
        made = quantized(self, edges, observers, self.activation_bits, self.activation_symmetric, self.ranges)
        yield made
        study.notes.append(made.describe())
        yield from self.weights(study, placement, scales_read(graph, placement))
        self._train(study, graph)
        exact, turned = told_apart(graph, norms)
        yield from leave(turned)
        if exact:
            yield Fold(tuple(exact))
        round_biases(graph, placement)

    def _scaled_by(self, graph: ModelGraph, norm: str) -> bool:
        """Whether the scales of the layer in front of a batch norm, one for every output, can take up its factors."""
        node = next(node for node, name in value_names(graph).items() if name == norm)
        layer = node.all_input_nodes[0]
        weight = weight_of(layer)
        assert weight is not None
        axis = self.grid(weight, outputs_axis(layer)).axis
        outputs = len(attribute(graph, str(arguments(node)["running_mean"].target)))
        return axis is not None and attribute(graph, weight).shape[axis] == outputs

    def _train(self, study: Study, graph: ModelGraph) -> None:
        learned = {name: m for name, m in graph.named_modules() if isinstance(m, Rounded | Gridded)}
        try:
            for module in learned.values():
                if self.learn == "nothing":
                    break
                module.learn() if isinstance(module, Gridded) else module.learn(self.learn)
            if self.distill:
                pupil = Pupil(graph, study.original, study.task, self.temperature)
                assert study.task.train is not None
                try:
                    study.task.train(pupil, self.epochs, loss=pupil.loss)
                except TypeError as error:
                    raise TaskError(
                        f"distillation calls train(model, epochs, loss=...), which failed with a TypeError: {error}"
                    ) from error
            else:
                finetune(graph, study.task, self.epochs)
        finally:
            for module in learned.values():
                module.settle()
        values = dict(graph.named_parameters())
        steps = {f"{name}.scale" for name in learned} & set(values)
        bad = [n for n, v in values.items() if not bool(v.isfinite().all()) or (n in steps and not bool((v > 0).all()))]
        if bad:
            raise TaskError(
                f"training left values that are NaN or infinite, or steps of grids that are 0, in {first_few(bad)}: "
                "lower its learning rate"
            )


class Pupil(nn.Module):
    """A network that remembers, at every call, what its teacher answers to the same inputs.

    Args:
        network: what is trained.
        teacher: whose answers are right; a copy of it is used, and not trained.
        task: whose loss says whether it is a classifier.
        temperature: that both distributions are divided by.
    """

    def __init__(self, network: nn.Module, teacher: nn.Module, task: Task, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.__dict__["_teacher"] = copy.deepcopy(teacher).requires_grad_(False)  # no part of what is trained
        self._task, self._temperature = task, temperature
        self._right: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer."""
        teacher: nn.Module = self.__dict__["_teacher"]
        with torch.no_grad(), mode(teacher, training=False):
            self._right = teacher(*args, **kwargs)
        return self.network(*args, **kwargs)

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """How far the last answer is from the teacher's; the target has no say.

        For a classifier ``T² · KL(teacher ‖ network)`` of distributions at temperature T (Hinton et al., 2015,
        arxiv.org/abs/1503.02531), otherwise the mean squared error.
        """
        right, loss = self._right, self._task.loss
        dim = class_dimension(right, loss)
        if dim is None:
            pairs = zip(tensors_in(outputs), tensors_in(right), strict=False)
            return torch.stack([(a - b).square().mean() for a, b in pairs if a.is_floating_point()]).sum()
        # A loop may take the logits out of an answer before it asks for the loss.
        mine, its = (logits_of(x).movedim(dim, -1) / self._temperature for x in (outputs, right))
        flat = [x.flatten(0, -2).log_softmax(-1) for x in (mine, its)]
        return kl_div(flat[0], flat[1], reduction="batchmean", log_target=True) * self._temperature**2
