"""Magnitude pruning: small weights go; at once, in rounds with training between, or little by little in a training.

Han et al., Learning both weights and connections for efficient neural networks, 2015, arxiv.org/abs/1506.02626 (prune
and train in rounds); Zhu & Gupta, To prune, or not to prune, 2017, arxiv.org/abs/1710.01878 (gradually). Weights can
also go by what they do to the loss: Molchanov et al., Importance estimation for neural network pruning, 2019,
arxiv.org/abs/1906.10771 (first order); Theis et al., 2018, arxiv.org/abs/1801.05787 (Fisher information).

With training this reaches furthest, and needs nothing but the weights. Without, `prune.OBS` loses far less.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from featherweight.batch import copied, mode
from featherweight.curvature import sweeps
from featherweight.curvature.gram import Statistics
from featherweight.edits import Edit, Leave, remade
from featherweight.forms import BlockMask, Constraint, Layer, Mask, beneath, layer_at
from featherweight.forms.pattern import WHOLE
from featherweight.layers import PerLayer, for_layer
from featherweight.layerwise import Bench
from featherweight.mend import finetune
from featherweight.prune import schedules
from featherweight.prune.sparsity import Unstructured
from featherweight.search.options import Plan
from featherweight.study import Study
from featherweight.task import Task

Score = Literal["l1", "l2", "random", "taylor", "fisher"]


@dataclass(frozen=True)
class Magnitude(Unstructured):
    """Zero the weights of lowest score.

    Attributes:
        asymmetric: whether Fisher scores are of the inputs that the pruned layers before give.
        threshold: weights whose absolute value is below go, instead of a share; per layer where it is a mapping.
        score: ``"l1"`` or ``"l2"`` (which differ for blocks alone), ``"random"``, ``"taylor"`` (the squared first-order
            change of the loss, from gradients batch by batch) or ``"fisher"`` (the second-order one, from the
            curvature); the last two look at the calibration data.
        block: (outputs, inputs) of what stays or goes together.
        schedule: ``"one-shot"``; ``"iterative"`` (in every round more goes and `epochs` are trained, until the score
            has dropped by more than `max_drop`); ``"gradual"`` (in so many rounds during `epochs` of training). Shares
            rise by the cubic schedule: much early.
        rounds: of the last two.
        max_drop: how far the score may fall below what it was, in its own units; the last round that kept to it is the
            result. None for all rounds.
    """

    asymmetric: bool = False
    threshold: PerLayer[float] | None = None
    score: Score = "l1"
    block: tuple[int, int] = WHOLE
    schedule: Literal["one-shot", "iterative", "gradual"] = "one-shot"
    rounds: int = 8
    max_drop: float | None = None

    # Settings -------------------------------------------------------------------------------------------------------

    def ways(self) -> dict[str, Any]:
        return {**super().ways(), "threshold": self.threshold}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        for value in self.threshold.values() if isinstance(self.threshold, Mapping) else [self.threshold]:
            if isinstance(value, int | float) and not 0 < value < float("inf"):
                found.append(f"threshold is {value}: weights whose absolute value is below go, so it is above 0")
        if isinstance(self.block, tuple) and (len(self.block) != 2 or min(self.block, default=0) < 1):
            found.append(f"block is {self.block}: it is (outputs, inputs), each at least 1")
        elif self.block != WHOLE and (self.threshold is not None or self.n is not None or self.spread == "lamp"):
            other = "spread='lamp'" if self.spread == "lamp" else "n" if self.n is not None else "threshold"
            found.append(f"{other} is about single weights, and block is {self.block}: give one of them")
        if self.score in ("taylor", "fisher") and (not task.has_calibration or self.data_aware is False):
            found.append(
                f"score={self.score!r} looks at the data: give Task(calibration=...), and not data_aware=False"
            )
        if self.schedule != "one-shot" and not (self.epochs and task.train):
            found.append(f"schedule={self.schedule!r} trains: give epochs= and Task(train=...)")
        if self.schedule != "one-shot" and self.epochs_per_layer:
            found.append(f"schedule={self.schedule!r} prunes all layers at once: give epochs=, not epochs_per_layer=")
        if isinstance(self.rounds, int) and self.rounds < 1:
            found.append(f"rounds is {self.rounds}: it must be at least 1")
        if self.max_drop is not None and self.schedule != "iterative":
            found.append("max_drop ends an iterative schedule: give schedule='iterative'")
        if isinstance(self.max_drop, int | float) and self.max_drop < 0:
            found.append(f"max_drop is {self.max_drop}: it must be at least 0")
        return found

    # What goes ------------------------------------------------------------------------------------------------------

    def unfit(self, layer: Layer) -> str | None:
        if (reason := super().unfit(layer)) is not None or self.block == WHOLE:
            return reason
        return BlockMask(0, self.block).reason_against(layer.weight.shape)

    def form(self, layer: Layer, kept: int) -> Constraint:
        if self.block == WHOLE:
            return Mask(kept)
        return BlockMask(max(1, round(kept / (self.block[0] * self.block[1]))), self.block)

    def scores(self, layer: Layer, seen: Statistics | None) -> Tensor:
        if self.score == "fisher":
            of = sweeps.of_layer(layer, seen)
            weight = layer.weight.detach().double()
            return weight.square() * sweeps.diagonal(of).reshape(weight.shape)
        if self.score == "taylor":
            gradient = beneath(layer).grad
            assert gradient is not None  # written by _bench
            return (layer.weight.detach().double() * gradient).square()
        return magnitude(layer, self.score)

    def counts(self, bench: Bench) -> dict[str, int]:
        if self.threshold is None:
            return super().counts(bench)
        found = {}
        for name, layer in bench.layers.items():
            limit = for_layer(self.threshold, name, default=0.0)
            found[name] = int((layer.weight.detach().abs() >= limit).sum())
        return found

    def _bench(self, study: Study) -> Bench:
        bench = super()._bench(study)
        if self.score == "taylor" and "weight gradients" not in study.worked_out:
            study.worked_out["weight gradients"] = True
            _write_gradients(study, bench.layers, self.samples)
        return bench

    # In rounds ------------------------------------------------------------------------------------------------------

    def edits(self, study: Study) -> Iterator[Edit]:
        if self.schedule == "one-shot":
            yield from super().edits(study)
            return
        bench = self._bench(study)
        choosing = self.choose(bench)
        model, reached = self._in_rounds(study, bench, choosing.plan)
        for name, form in reached.items():
            bench.offer(name, form)
        bench.record(replace(choosing, plan=Plan(self.name, reached)))
        yield from (Leave(name, reason) for name, reason in bench.left.items())
        yield from (Leave(name, "nothing was to go from it") for name in bench.kept(Plan(self.name, reached)))
        for name, form in reached.items():
            yield remade(model, name, form, layer_at(model, name).state_dict())
        if reached:
            study.model.load_state_dict(model.state_dict())  # what was trained beside the masked weights

    def _in_rounds(self, study: Study, bench: Bench, plan: Plan) -> tuple[nn.Module, dict[str, Constraint]]:
        """The model after the last round that was good enough, and what its layers are then."""
        model, reached = copied(study.model), dict[str, Constraint]()
        best = model, reached
        epochs = self.epochs / self.rounds if self.schedule == "gradual" else self.epochs
        for done in range(1, self.rounds + 1):
            share = schedules.cubic(done, final=1.0, end=self.rounds)
            model, reached = copied(model), {}
            for name, form in plan.layers.items():
                layer = cast(Layer, layer_at(model, name))
                reached[name] = now = self._part_of(cast(Constraint, form), bench.layers[name], share)
                # The scores of the data are those of the model before: gradients and moments of it as it was.
                seen = bench.statistics.get(name) if bench.aware else None
                if self.score == "taylor":
                    beneath(layer).grad = beneath(bench.layers[name]).grad
                remade(model, name, now, self.values(layer, now, seen)).apply(model)
            model.zero_grad()
            finetune(model, study.task, epochs)
            if self.max_drop is not None:
                drop = bench.baseline - study.scorer(model)
                if drop > self.max_drop:
                    study.notes.append(f"round {done} of {self.rounds} dropped by {drop:.4g}: the one before is kept")
                    return best
            best = model, reached
        return best

    def _part_of(self, form: Constraint, layer: Layer, share: float) -> Constraint:
        """The form when so much of all that is to go has gone."""
        if not isinstance(form, Mask | BlockMask):
            return form
        size = layer.weight.numel() // (self.block[0] * self.block[1])
        return replace(form, kept=round(size - share * (size - form.kept)))


def magnitude(layer: Layer, score: str) -> Tensor:
    """What weights are worth by their size: |w|, w², or random numbers, the same for every layer of as many weights."""
    weight = layer.weight.detach().double()
    if score == "random":
        seed = zlib.crc32(f"{torch.initial_seed()} {tuple(weight.shape)}".encode())
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return drawn.to(weight.device) * (weight != 0)
    return weight.abs() if score == "l1" else weight.square()


def _write_gradients(study: Study, layers: Mapping[str, Layer], samples: int) -> None:
    """Give the weights of the original the root mean square of their gradients over batches, where gradients are kept.

    The loss is the divergence from the model's own answers, as the curvature's is: no labels are needed.
    """
    model = copied(study.original)
    weights = {name: beneath(cast(Layer, layer_at(model, name))).requires_grad_() for name in layers}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    generator, count = torch.Generator().manual_seed(study.seed), 0
    loss = study.probe()
    with mode(model, training=False):
        for inputs in study.task.batches(model, samples):
            found = torch.autograd.grad(loss(inputs.into(model), generator), [*weights.values()], allow_unused=True)
            count += 1
            for square, gradient in zip(squares.values(), found, strict=True):
                if gradient is not None:
                    square += gradient.square() / inputs.batch_size**2
    for name, square in squares.items():
        beneath(layers[name]).grad = (square / max(1, count)).sqrt()
