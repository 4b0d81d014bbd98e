"""One kind of knowledge made ready for one student and one teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from featherweight.batch import Inputs, describe
from featherweight.distill.watching import Answer, Look, Tap
from featherweight.errors import TaskError
from featherweight.task import Loss


@dataclass(frozen=True)
class Scene:
    """Student and teacher on the example, for a term to find out what it needs to know.

    Attributes:
        student, teacher: the networks.
        mine, its: what the student and the teacher gave.
        loss: the task's; None where it has none.
    """

    student: nn.Module
    teacher: nn.Module
    mine: Look
    its: Look
    loss: Loss | None


@dataclass(frozen=True)
class Given:
    """What else belongs to a batch.

    Attributes:
        mask: where outputs count, of the shape of their first dimensions; None for everywhere.
        target: the loader's; None where it is not known.
    """

    mask: Tensor | None = None
    target: Any = None


class Term(nn.Module, ABC):
    """A loss between student and teacher, with the adapters that it trains along, which are its parameters.

    Attributes:
        mine, its: where it looks into the student and into the teacher.
    """

    mine: tuple[Tap, ...] = ()
    its: tuple[Tap, ...] = ()

    @abstractmethod
    def forward(self, student: Answer, teacher: Answer, given: Given) -> Tensor:
        """The loss of a batch, a scalar."""

    def finish(self, student: nn.Module, teacher: nn.Module) -> None:
        """What is left to do to the student when the training is over."""


def counted(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors that count: (samples, *positions, width) → (vectors, width).

    Args:
        tensor: as above.
        mask: (samples, *positions), or of a few dimensions less; not 0 where a vector counts. One that does not fit the
            tensor says nothing of it.
    """
    if mask is not None and mask.ndim < tensor.ndim and tensor.shape[: mask.ndim] == mask.shape:
        tensor = tensor[mask.to(tensor.device) != 0]
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor


def masked_by(inputs: Inputs, mask: str | int | None) -> Tensor | None:
    """The input that says where outputs count; None where there is no such input."""
    if isinstance(mask, int):
        value = inputs.args[mask] if mask < len(inputs.args) else None
    else:
        value = inputs.kwargs.get(mask) if mask is not None else None
    return value if isinstance(value, Tensor) else None


def check_alike(scene: Scene) -> None:
    """Both networks give the same outputs, in name and shape.

    Raises:
        TaskError: they do not.
    """
    mine, its = ({n: tuple(t.shape) for n, t in look.outputs.items()} for look in (scene.mine, scene.its))
    if not mine:
        raise TaskError("the student's outputs hold no floating-point tensor: there is nothing to match")
    if mine != its:
        said = [
            ", ".join(f"{name} {describe(tensor)}" for name, tensor in look.outputs.items()) or "nothing"
            for look in (scene.mine, scene.its)
        ]
        raise TaskError(
            f"the student gives {said[0]} and the teacher {said[1]}: to match answers they must be alike. "
            "distill.Feature and distill.Relation do without"
        )
