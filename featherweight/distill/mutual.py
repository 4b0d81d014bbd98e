"""Mutual learning: networks that train together, each on the labels and on what the others answer.

Zhang et al., Deep mutual learning, 2018, arxiv.org/abs/1706.00384. There is no teacher: the peers are gone afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.batch import Inputs, device_of
from featherweight.distill.fresh import start_anew
from featherweight.distill.learning import learn
from featherweight.distill.offline import said_of
from featherweight.distill.online import OnlineLoss, unknown_loss
from featherweight.distill.response import Response, unknown_kinds
from featherweight.distill.term import Given, Scene, Term
from featherweight.distill.watching import Answer, look, outputs_of
from featherweight.errors import TaskError
from featherweight.layers import PerLayer
from featherweight.retraining import Retraining
from featherweight.step import plain
from featherweight.study import Study
from featherweight.task import Loss, Task, working_copy

# Added to the seed of peers' initial values: with the run's own a peer could begin as the network itself once did.
PEERS = 0x5EED


@dataclass(frozen=True)
class Mutual(Retraining):
    """Train the network together with peers, which learn from it as it learns from them.

    Attributes:
        peers: with whom: how many networks of its own form, with initial values of their own; ``"original"``, a copy of
            the network that the recipe was given; a network, or a list of several. Those that are given are copied.
        by: how answers are matched, as in `distill.Response`.
        weight: how much the peers' answers count; the paper's 1.
        temperature: of the softmax; the paper's 1.
    """

    peers: Any = 1
    by: PerLayer[str] | None = None
    weight: float = 1.0
    temperature: float = 1.0

    def settings(self) -> dict[str, Any]:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        default = {f.name: f.default for f in fields(self)}
        said = {name: plain(value) for name, value in given.items() if name != "peers" and value != default[name]}
        if self.peers != 1:
            several = isinstance(self.peers, tuple)
            said["peers"] = [said_of(peer) for peer in self.peers] if several else said_of(self.peers)
        return said

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if found:
            return found
        if task.train is None and self.trains(model):
            found.append("networks that learn from each other need labels: give Task(train=...)")
        named = self.peers if isinstance(self.peers, tuple) else (self.peers,)
        number = isinstance(self.peers, int) and not isinstance(self.peers, bool)
        right = (self.peers >= 1) if number else all(isinstance(p, nn.Module) or p == "original" for p in named)
        if not right or not named:
            found.append(f"peers is {self.peers!r}: it is a number, 'original', a network or a list of networks")
        found += unknown_kinds(self.by)
        for name in ("weight", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                found.append(f"{name} is {value}: it must be more than 0")
        return found

    def check(self, study: Study) -> None:
        """Look at the peers beside the network as it is now.

        Raises:
            TaskError: they do not take the same inputs, or do not give the same outputs.
        """
        if self.trains(study.model):
            self._loss(study).close()

    def retrain(self, study: Study) -> Any:
        return learn(study, self._loss(study), self.epochs, self.options)

    def _loss(self, study: Study) -> MutualLoss:
        with torch.random.fork_rng(devices=()):  # so that looking beforehand draws no number of the training's
            torch.manual_seed(PEERS + study.seed)
            peers = self._peers(study)
        response = Response(by=self.by, temperature=self.temperature)
        return MutualLoss(study.model, peers, response, self.weight, study.task.inputs(), study.task.loss)

    def _peers(self, study: Study) -> list[nn.Module]:
        if isinstance(self.peers, int):
            made = [copy.deepcopy(study.model) for _ in range(self.peers)]
            kept = {name for peer in made for name in start_anew(peer)}
            note = f"the peers begin with the network's own values in {', '.join(sorted(kept))}"
            if kept and note not in study.notes:
                study.notes.append(note)
            return made
        named = self.peers if isinstance(self.peers, tuple) else (self.peers,)
        found = [(study.given or study.original) if isinstance(peer, str) else peer for peer in named]
        return [working_copy(peer).to(device_of(study.model)) for peer in found]


class MutualLoss(OnlineLoss):
    """``Σᵢ task's loss + weight · mean over j of D(network j, network i)``, over the student and all its peers.

    For a loop of one's own, whose optimizer is to have the parameters of both: close it afterwards.

    Args:
        student: the network that is kept.
        peers: the others.
        response: how answers are matched.
        weight: how much that counts.
        example: inputs of one call.
        task_loss: of outputs and targets; None for cross entropy.
    """

    def __init__(
        self,
        student: nn.Module,
        peers: Sequence[nn.Module],
        response: Response,
        weight: float,
        example: Inputs,
        task_loss: Loss | None = None,
    ) -> None:
        self.weight = weight
        networks = [student, *peers]
        if (problem := unknown_loss(student, example, task_loss)) is not None:
            raise TaskError(problem)
        who = ["the student", *(f"peer {n}" for n in range(1, len(networks)))]
        looks = [look(network, example, name) for network, name in zip(networks, who, strict=True)]
        self.terms: dict[tuple[int, int], Term] = {
            (i, j): response.term(Scene(networks[i], networks[j], looks[i], looks[j], task_loss))
            for i in range(len(networks))
            for j in range(len(networks))
            if i != j
        }
        for peer in peers:
            peer.train()
        super().__init__(student, nn.ModuleList(peers), task_loss)

    def of(self, outputs: Any, target: Any) -> Tensor:
        """The sum of all networks' losses."""
        inputs, raw = self.call.take()
        raws = [raw, *(self.call.again(peer, inputs) for peer in self.others)]
        answers = [outputs_of(one) for one in raws]
        still = [Answer({name: tensor.detach() for name, tensor in answer.items()}) for answer in answers]
        total: Any = 0.0
        for i, answer in enumerate(answers):
            given = outputs if i == 0 else _like(outputs, raws[i])
            name = "the task's loss" if i == 0 else "the peers' task's loss"
            total = total + self.count(name, self.hard(given, target))
            for j in range(len(answers)):
                if i != j:
                    value = self.terms[i, j](Answer(answer), still[j], Given(target=target)) / (len(answers) - 1)
                    total = total + self.weight * self.count("what the networks learn from each other", value)
        if not isinstance(total, Tensor):
            raise TaskError("there are no networks to learn from each other")
        return total


def _like(outputs: Any, raw: Any) -> Any:
    """A peer's outputs as the task's loss takes them: in float32 and without what is beside the logits."""
    raw = getattr(raw, "logits", raw)
    return raw.float() if isinstance(raw, Tensor) and isinstance(outputs, Tensor) else raw
