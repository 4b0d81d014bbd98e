"""The loss object: what a student is trained by, in a step of ours or in a loop of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featherweight.batch import Inputs, as_inputs, device_of, mode
from featherweight.distill.cache import Cache, keys_of
from featherweight.distill.term import Given, Scene, Term, masked_by
from featherweight.distill.watching import Answer, LastCall, Tap, Watch, classes_in, look, outputs_of
from featherweight.errors import TaskError
from featherweight.task import Loss, fingerprint
from featherweight.train.evaluate import loss_of

# The name under which adapters are parts of the student while it is trained by a function that only knows the student.
ATTACHED = "distillation_adapters"


class Kind(Protocol):
    """What says which knowledge to learn, such as a `distill.Response`: a step that is used as a part of a loss."""

    @property
    def name(self) -> str:
        """How it is called in messages."""

    @property
    def weight(self) -> float:
        """How much it counts."""

    def terms(self) -> Sequence[Kind]:
        """What it is made of: itself, for most."""

    def term(self, scene: Scene) -> Term:
        """It, made ready for a student and a teacher."""


class Distillation:
    """``hard · task's loss + Σ weight · term``, of the batch that the student was last called with.

    A hook on the student sees its inputs, and the teacher is asked about the same ones, augmented as they are, in
    evaluation mode and without gradients. Use it as a context, or call `close`: hooks and adapters are then gone, and
    the student's state dict was never other than its own.

        with distill.Distillation(student, teacher, distill.Response(), example=images[:1]) as loss:
            optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1)
            for x, y in loader:
                optimizer.zero_grad()
                loss(student(x), y).backward()
                optimizer.step()

    Args:
        student: the network that learns; call it in training mode.
        teachers: a network, or several: the loss is then the mean over them, which for soft targets has the gradients
            of the mean of their distributions.
        kinds: what to learn, as steps such as ``distill.Response(temperature=2)``, sums or lists of them.
        task_loss: of outputs and targets: ``"cross_entropy"``, ``"mse"`` or a function; None for cross entropy where
            the student is a classifier.
        hard: the weight of the task's loss; None for 1, and for 0 where there is no loss to be told.
        example: inputs of one call. Without it student and teacher are looked at in the first batch, which is too late
            for an optimizer to know of adapters.
        mask: the input, by name or by place, that says where outputs count, such as ``"attention_mask"``; not used
            where there is none.
        cache: a folder for the teachers' answers, so that of the same inputs they are asked once.

    Attributes:
        calls: how often the loss was asked for.
        parts: the mean of each of its parts so far, by name.

    Raises:
        TaskError: teacher and student do not fit each other, or a pattern matches no layer.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module],
        *kinds: Any,
        task_loss: Loss | None = None,
        hard: float | None = None,
        example: Any = None,
        mask: str | int | None = "attention_mask",
        cache: str | None = None,
    ) -> None:
        self.student = student
        self.teachers = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        self.kinds: list[Kind] = [term for kind in _flat(kinds) for term in kind.terms()]
        self.task_loss, self._hard, self._mask, self._folder = task_loss, hard, mask, cache
        if not self.teachers or not self.kinds:
            raise TaskError("a distillation needs a teacher, and something to learn, such as distill.Response()")
        if any(teacher is student for teacher in self.teachers):
            raise TaskError("the teacher is the student itself: give a copy of it, or another network")
        self.calls, self._sums = 0, dict[str, Tensor]()
        self._terms: list[list[Term]] = []
        self._watches: list[Watch] = []
        self._caches: list[Cache | None] = []
        self._call = LastCall(student)
        try:
            if example is not None:
                self._prepare(as_inputs(example))
        except BaseException:
            self.close(finish=False)
            raise

    # The loss -------------------------------------------------------------------------------------------------------

    def __call__(self, outputs: Any, target: Any = None) -> Tensor:
        """The loss of the student's last call.

        Args:
            outputs: what the student gave, or its ``.logits``.
            target: the loader's; not needed where the task's loss has no weight.
        Raises:
            TaskError: the student was not called since the last time, or called in evaluation mode.
        """
        soft = self._soft(target)
        if self.hard == 0:
            return soft
        logits = getattr(outputs, "logits", outputs)
        hard = loss_of(self.task_loss if self.task_loss is not None else "cross_entropy", logits, target)
        return self._with(hard, soft)

    def on(self, value: Tensor) -> Tensor:
        """The loss where the task's part was computed already, as by a training step of another library's.

        Args:
            value: the task's loss of the student's last call.
        """
        soft = self._soft(None)
        return soft if self.hard == 0 else self._with(value, soft)

    @property
    def hard(self) -> float:
        """The weight of the task's loss."""
        if self._hard is None:
            raise TaskError("the student was not called yet: call it, or give example=")
        return self._hard

    @property
    def parts(self) -> dict[str, float]:
        """The mean of each part of the loss so far, before weighting."""
        return {name: float(total) / self.calls for name, total in self._sums.items()}

    def begin_epoch(self) -> None:
        """Say that the data begins anew, as `fit` does: a cache then knows whether it is of use."""
        for cache in self._caches:
            if cache is not None:
                cache.begin_epoch()

    def _with(self, hard: Tensor, soft: Tensor) -> Tensor:
        self._count("the task's loss", hard)
        return self.hard * hard + soft

    def _soft(self, target: Any) -> Tensor:
        inputs, raw = self._call.take()
        if not self._terms:
            self._prepare(inputs)
            if any(term.mine for terms in self._terms for term in terms):
                raise TaskError(
                    "this distillation looks into the student: give example=, so that it can before its call"
                )
        self.calls += 1
        mine = Answer(outputs_of(raw), self._watches[0].take())
        given = Given(masked_by(inputs, self._mask), target)
        total: Any = 0.0
        for number, terms in enumerate(self._terms):
            its = self._teach(number, inputs)
            for kind, term in zip(self.kinds, terms, strict=True):
                value = term(mine, its, given)
                self._count(kind.name, value / len(self.teachers))
                total = total + value * (kind.weight / len(self.teachers))
        return total  # type: ignore[no-any-return]

    def _count(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _teach(self, number: int, inputs: Inputs) -> Answer:
        """What a teacher says of the student's inputs."""
        teacher, cache, watch = self.teachers[number], self._caches[number], self._watches[1 + number]
        device = next((t.device for t in inputs.tensors()), device_of(teacher))
        keys = [] if cache is None else keys_of(inputs)
        if cache is not None and (known := cache.get(keys)) is not None:
            return _answer({name: tensor.to(device) for name, tensor in known.items()})
        with torch.no_grad(), mode(teacher, training=False):
            raw = self._call.again(teacher, inputs)
        answer = Answer(outputs_of(raw), watch.take())
        if cache is not None:
            cache.put(keys, _flattened(answer))
        return answer

    # Hooks and adapters ---------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapters' parameters, to be given to the optimizer beside the student's."""
        for terms in self._terms:
            for term in terms:
                yield from term.parameters()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the adapters are parts of the student, which whoever trains it trains along."""
        with part_of(self.student, nn.ModuleList(term for terms in self._terms for term in terms)):
            yield

    def close(self, finish: bool = True) -> None:
        """Take all hooks off, and do what is to be done to the student when it has learned.

        Args:
            finish: False to leave the student as it is, as after an error.
        """
        self._call.close()
        for watch in self._watches:
            watch.close()
        for cache in self._caches:
            if cache is not None:
                cache.close()
        self._caches = [None for _ in self._caches]
        if finish and self.calls:
            for teacher, terms in zip(self.teachers, self._terms, strict=True):
                for term in terms:
                    term.finish(self.student, teacher)
        self._terms = []

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(finish=kind is None)

    def _prepare(self, example: Inputs) -> None:
        """Look at both networks, and make every term ready."""
        mine = look(self.student, example, "the student")
        self._call.forget()
        if self._hard is None:
            classes = classes_in(mine, self.task_loss)
            self._hard = 0.0 if self.task_loss is None and classes is None else 1.0
        own: list[Tap] = []
        self._watches = [Watch(self.student, [])]
        for teacher in self.teachers:
            scene = Scene(self.student, teacher, mine, look(teacher, example, "the teacher"), self.task_loss)
            terms = [kind.term(scene).to(device_of(self.student)) for kind in self.kinds]
            own += [tap for term in terms for tap in term.mine]
            its = [tap for term in terms for tap in term.its]
            self._terms.append(terms)
            self._watches.append(Watch(teacher, its))
            self._caches.append(self._cache(teacher, its))
        self._watches[0] = Watch(self.student, own)

    def _cache(self, teacher: nn.Module, taps: Sequence[Tap]) -> Cache | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(f"{fingerprint(teacher)} {[str(tap) for tap in taps]}".encode())
        return Cache(self._folder, digest.hexdigest())


@contextmanager
def part_of(student: nn.Module, modules: nn.ModuleList) -> Iterator[None]:
    """Inside, these modules are parts of the student, which whoever trains it trains along; then they are gone."""
    if not any(True for _ in modules.parameters()):
        yield
        return
    # A sequence runs whatever it holds; a layer does not.
    layers = (module for module in student.modules() if next(module.children(), None) is None)
    host = next(layers, student) if isinstance(student, nn.Sequential) else student
    host.add_module(ATTACHED, modules)
    try:
        yield
    finally:
        delattr(host, ATTACHED)


def _flat(kinds: Sequence[Any]) -> Iterator[Kind]:
    for kind in kinds:
        if isinstance(kind, list | tuple):
            yield from _flat(kind)
        elif not callable(getattr(kind, "term", None)):
            raise TaskError(f"{kind!r} is no knowledge to distil: give distill.Response(), Feature() or Relation()")
        else:
            yield kind


def _flattened(answer: Answer) -> dict[str, Tensor]:
    """An answer as tensors by name, for a cache."""
    taps = {f"{tap.side} {tap.layer}": tensor for tap, tensor in answer.taps.items()}
    return {**{f"answer {name}": tensor for name, tensor in answer.outputs.items()}, **taps}


def _answer(tensors: Mapping[str, Tensor]) -> Answer:
    outputs, taps = dict[str, Tensor](), dict[Tap, Tensor]()
    for key, tensor in tensors.items():
        side, _, name = key.partition(" ")
        if side == "answer":
            outputs[name] = tensor.float()
        else:
            taps[Tap(name, side)] = tensor.float()
    return Answer(outputs, taps)
