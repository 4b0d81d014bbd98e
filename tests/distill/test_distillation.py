"""The loss object: in a loop of one's own, with what it may and may not touch, and all that can be wrong with it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from students import divergence, images, loader, net
from torch import Tensor, nn

from featherweight import distill, matching
from featherweight.distill import Distillation
from featherweight.errors import TaskError

X, Y = images(12).tensors


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_loop_of_ones_own():
    student, teacher = net(2), net(6, seed=1)
    names, before, far = list(student.state_dict()), state(teacher), divergence(student, teacher)
    kinds = [distill.Response(temperature=2.0), distill.Feature(weight=0.1)]
    with Distillation(student, teacher, *kinds, hard=0, example=X[:1]) as loss:
        adapters = list(loss.parameters())
        assert [tuple(p.shape) for p in adapters] == [(6, 2), (12, 4)], "one for each stage"
        optimizer = torch.optim.SGD([*student.parameters(), *adapters], lr=0.05, momentum=0.9)
        drawn = [p.detach().clone() for p in adapters]
        for _ in range(8):
            for x, y in loader():
                optimizer.zero_grad()
                loss(student(x), y).backward()
                optimizer.step()
        assert list(student.state_dict()) == names, "the student's state is never other than its own"
        assert all(not torch.equal(p, q) for p, q in zip(adapters, drawn, strict=True)), "adapters are trained"
        assert set(loss.parts) == {"distill.Response", "distill.Feature"}
    assert hooks(student) == hooks(teacher) == 0
    assert divergence(student, teacher) < far
    assert not teacher.training or all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_value_is_the_sum_it_says():
    student, teacher = net(2).train(), net(4, seed=1)
    response = distill.Response(temperature=2.0, weight=0.7)
    with Distillation(student, teacher, response, task_loss="cross_entropy", hard=0.3) as loss:
        outputs = student(X)
        value = loss(outputs, Y)
    with torch.no_grad():
        told = copy.deepcopy(teacher).eval()(X)
    expected = 0.3 * F.cross_entropy(outputs, Y) + 0.7 * matching.soft_targets(outputs, told, 2.0)
    assert torch.allclose(value, expected)


def test_the_teacher_sees_what_the_student_saw_and_stays_as_it_is():
    seen = []

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop = net(4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            assert not self.training
            assert not torch.is_grad_enabled()
            return self.drop(self.net(x))

    teacher, student = Teacher().train(), net(2).train()
    before = state(teacher)
    with Distillation(student, teacher, distill.Response(), example=X[:1]) as loss:
        augmented = X + torch.randn(12, 1, 8, 8)
        loss(student(augmented), Y)
        assert torch.equal(seen[-1], augmented)
    assert teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_several_teachers_count_alike():
    student, teachers = net(2).train(), [net(4, seed=1), net(3, seed=2)]
    student.drop.p = 0.0
    values = []
    for given in (teachers, teachers[0], teachers[1]):
        twin = copy.deepcopy(student)
        with Distillation(twin, given, distill.Response(), hard=0) as loss:
            values.append(loss(twin(X)))
    assert torch.allclose(values[0], (values[1] + values[2]) / 2)


def test_bf16_is_the_teachers_too():
    kinds = []

    class Teacher(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            kinds.append(out.dtype)
            return out

    student, teacher = nn.Linear(4, 3).train(), Teacher(4, 3)
    with Distillation(student, teacher, distill.Response(), example=torch.ones(1, 4)) as loss:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = student(torch.ones(2, 4))
        value = loss(outputs.float(), torch.tensor([0, 1]))
    assert kinds == [torch.float32, torch.bfloat16]
    assert value.dtype == torch.float32


# Outputs of all kinds


class Boxes(nn.Module):
    """As a detector answers: classes and boxes of every place, and a number that is no answer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.classes, self.boxes = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"found": [{"logits": self.classes(x)}, self.boxes(x)], "count": torch.tensor(len(x))}


def test_any_tree_of_outputs_is_matched_tensor_by_tensor():
    student, teacher = Boxes(0).train(), Boxes(1)
    x = torch.randn(6, 4)
    named = {"found.0.logits": "soft_targets", "*": "error"}
    with Distillation(student, teacher, distill.Response(by=named, temperature=3.0), hard=0) as loss:
        value = loss(student(x))
    mine, its = student(x)["found"], teacher(x)["found"]
    expected = matching.soft_targets(mine[0]["logits"], its[0]["logits"], 3.0) + matching.relative_error(
        mine[1], its[1]
    )
    assert torch.allclose(value, expected)
    with pytest.raises(TaskError, match="the pattern 'box' matches none of 2 outputs"):
        Distillation(student, teacher, distill.Response(by={"box": "error"}), hard=0, example=x)


class Tokens(nn.Module):
    """As a model of sequences answers, (samples, positions, classes) under ``.logits``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embed(tokens)), hidden=torch.zeros(3))


@pytest.mark.parametrize(
    "kind",
    [distill.Response(), distill.Response(by="decoupled"), distill.Feature(layers=["embed"]), distill.Relation()],
    ids=["soft targets", "decoupled", "hint", "relation"],
)
def test_padding_does_not_count(kind):
    student, teacher = Tokens(0).train(), Tokens(1)
    tokens = torch.randint(9, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([3, 7, 5, 2])[:, None]).long()
    other = torch.where(mask == 1, tokens, (tokens + 1) % 9)
    values = []
    for given in (tokens, other):
        example = {"tokens": tokens, "attention_mask": mask}
        with Distillation(student, teacher, kind, hard=0, example=example) as loss:
            values.append(loss(student(given, attention_mask=mask)))
            values.append(loss(student(given, attention_mask=torch.ones_like(mask))))
    assert torch.allclose(values[0], values[2])
    assert not torch.allclose(values[1], values[3])


def test_positions_without_a_target_leave_the_right_class_to_the_teacher():
    student, teacher = Tokens(0).train(), Tokens(1)
    tokens = torch.randint(9, (2, 3))
    target = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    with Distillation(student, teacher, distill.Response(by="decoupled", temperature=2.0), hard=0) as loss:
        value = loss(student(tokens), target)
    s, t = (m(tokens).logits.flatten(0, 1) for m in (student, teacher))
    labels = torch.where(target.flatten() >= 0, target.flatten(), t.argmax(1))
    assert torch.allclose(value, matching.decoupled(s, t.detach(), labels, 2.0))


# What cannot be


def test_a_student_in_evaluation_mode():
    student = net(2).eval()
    with Distillation(student, net(4), distill.Response(), example=X[:1]) as loss:
        outputs = student(X)
        with pytest.raises(TaskError, match=r"the student is in evaluation mode: call student\.train\(\)"):
            loss(outputs, Y)
        student.train()
        loss(student(X), Y)


def test_a_student_that_was_not_called():
    student, other = net(2).train(), net(2).train()
    with Distillation(student, net(4), distill.Response(), example=X[:1]) as loss:
        with pytest.raises(TaskError, match="was not called since the loss was last asked for"):
            loss(other(X), Y)
        outputs = student(X)
        loss(outputs, Y)
        with pytest.raises(TaskError, match="was not called since"):
            loss(outputs, Y)


@pytest.mark.parametrize(
    ("teacher", "kinds", "message"),
    [
        (
            net(4, classes=5),
            [distill.Response()],
            r"the student gives output float32\[1, 3\] and the teacher .*\[1, 5\]",
        ),
        (nn.Linear(9, 3), [distill.Response()], "the teacher, a Linear, cannot run on the example.*the same inputs"),
        (
            net(4),
            [distill.Feature(layers={"stem": "sten"})],
            "'sten' matches none of the 5 layers that the teacher",
        ),
        (net(4), [distill.Feature(layers=["stage*"])], "'stage.' matches none of the 5 layers that the student calls"),
        (net(4), [distill.Feature(layers={"*o*": "stem"})], "matches 3 layers of the student .* and 'stem' 1 of the"),
        (net(4), [distill.Feature(layers={"head": "stem"})], "pair layers whose answers have as many dimensions"),
        (net(4), [distill.Feature(by="attention", layers=["head"])], "no positions to attend to"),
        (net(4, classes=5), [distill.Feature(by="simkd")], "they must give the same outputs"),
        (net(4), [], "something to learn"),
        (net(4), ["response"], "'response' is no knowledge to distil"),
        ([], [distill.Response()], "needs a teacher"),
    ],
)
def test_teachers_and_patterns_that_do_not_fit(teacher, kinds, message):
    student = net(2).train()
    with pytest.raises(TaskError, match=message):
        Distillation(student, teacher, *kinds, example=X[:1])
    assert hooks(student) == 0


def test_the_student_is_not_its_own_teacher():
    student = net(2)
    with pytest.raises(TaskError, match="the teacher is the student itself: give a copy"):
        Distillation(student, student, distill.Response())


def test_outputs_may_differ_where_only_layers_are_matched():
    student, teacher = net(2).train(), net(4, classes=7)
    with Distillation(student, teacher, [distill.Feature(), distill.Relation()], example=X[:1]) as loss:
        assert torch.isfinite(loss(student(X), Y))


def test_adapters_must_be_known_before():
    student = net(2).train()
    with Distillation(student, net(4), distill.Feature()) as loss:
        outputs = student(X)
        with pytest.raises(TaskError, match="give example="):
            loss(outputs, Y)


def test_a_function_does_not_tell_what_its_outputs_are():
    student = net(2).train()

    def smoothed(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target, label_smoothing=0.1)

    with pytest.raises(TaskError, match=r"does not tell whether output.*give by='soft_targets'"):
        Distillation(student, net(4), distill.Response(), task_loss=smoothed, example=X[:1])
    with Distillation(student, net(4), distill.Response(by="soft_targets"), task_loss=smoothed, example=X[:1]) as loss:
        assert torch.isfinite(loss(student(X), Y))
