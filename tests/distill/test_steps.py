"""Distillation as steps of recipes: after anything, from the right teacher, with nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from students import divergence, images, loader, net, task
from torch import Tensor, nn
from torch.nn.utils import parametrize

import featherweight as fw
from featherweight import distill, factorize, prune, quantize, tune
from featherweight.distill.distillation import ATTACHED
from featherweight.errors import RecipeError, TaskError

CLOSE = {"hard": 0.0, "options": {"lr": 0.02}}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that knows its classes."""
    model = net(6)
    fw.fit(model, loader(), epochs=12, lr=0.1)
    return model.eval()


def test_a_narrowed_network_learns_from_the_one_it_was_made_of(trained):
    job = task()
    step = prune.Channels(ratio=0.5, score="random", reconstruct=False)
    pruned = fw.compress(trained, step, task=job)
    healed = fw.compress(trained, step, distill.Response(epochs=8, **CLOSE), task=job)
    assert divergence(healed.model, trained) < 0.5 * divergence(pruned.model, trained)
    assert [t.shape for t in healed.model.parameters()] == [t.shape for t in pruned.model.parameters()]
    first, second = healed.ledger.steps
    assert second.before.score == first.after.score
    assert second.after.total == first.after.total
    assert any("the loss's parts" in note and "distill.Response" in note for note in second.notes)
    assert any("trained for 32 updates" in note for note in second.notes)


def test_before_is_the_network_as_it_was(trained):
    job = task()
    steps = [factorize.SpatialSVD(ratio=0.5), distill.Response(epochs=2, teacher="before", **CLOSE)]
    after = fw.compress(trained, *steps, task=job)
    halved = fw.compress(trained, steps[0], task=job).model
    assert divergence(after.model, halved) < divergence(after.model, trained)


def test_a_small_network_of_ones_own_learns_from_a_large_one(trained):
    small = net(2, seed=3)
    learned = fw.compress(small, distill.Response(teacher=trained, epochs=20, **CLOSE), task=task())
    alone = fw.compress(small, tune.FineTune(epochs=20, options={"lr": 0.02}), task=task())
    assert divergence(learned.model, trained) < 0.7 * divergence(alone.model, trained)
    assert learned.ledger.steps[0].settings["teacher"].startswith("a Net, ")


def test_what_constrains_a_tensor_still_does(trained):
    class Mask(nn.Module):
        def __init__(self, kept: Tensor) -> None:
            super().__init__()
            self.register_buffer("kept", kept)

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.kept

    model = copy.deepcopy(trained)
    kept = (torch.rand(model.down.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    parametrize.register_parametrization(model.down, "weight", Mask(kept))
    job = task(lr=0.1)
    steps = [distill.Response(teacher=trained, epochs=2), distill.Feature(teacher=trained), tune.FineTune()]
    after = fw.compress(model, *steps, task=job).model
    assert torch.equal(after.down.weight != 0, kept != 0)
    assert not torch.equal(after.down.weight, model.down.weight)


def test_steps_before_and_behind_confine_what_is_trained_between(trained):
    """Masks of pruned weights hold through distillation, and quantization takes up what it made of the rest."""
    job = task()
    steps = [prune.Magnitude(sparsity=0.5), distill.Response(epochs=2), quantize.Weights(bits=4), distill.Response()]
    assert fw.Recipe(*steps).problems(trained, job) == []
    pruned = fw.compress(trained, steps[0], task=job).model
    after = fw.compress(trained, *steps, task=job)
    for name in ("stem", "down", "head"):
        gone = pruned.get_submodule(name).weight == 0
        weight = after.model.get_submodule(name).weight
        assert gone.any()
        assert not weight[gone].any(), name
        # Four bits a channel: no more than 16 values.
        assert max(len(row.unique()) for row in weight.detach().flatten(1)) <= 16
    assert [entry.step for entry in after.ledger.steps][1::2] == ["distill.Response"] * 2


def test_several_kinds_in_one_training(trained):
    seen: list[nn.Module] = []

    def train(model: nn.Module, epochs: float, loss: Any) -> None:
        seen.extend(getattr(model, ATTACHED))
        fw.fit(model, loader(), epochs, loss, lr=0.02)

    job = fw.Task(images(1).tensors[0], train=train, loss="cross_entropy")
    sum_ = distill.Response(teacher=trained, epochs=2, temperature=2.0) + distill.Feature(weight=0.5)
    sum_ += distill.Relation(weight=0.1)
    assert [type(kind) for kind in sum_.kinds] == [distill.Response, distill.Feature, distill.Relation]
    assert (sum_.epochs, sum_.teacher) == (2, trained)
    after = fw.compress(net(2), sum_, task=job)
    assert len(seen) == 3
    assert sum(p.numel() for p in seen[1].parameters()) == 2 * 6 + 4 * 12
    assert list(after.model.state_dict()) == list(net(2).state_dict())
    (note,) = [note for note in after.ledger.steps[0].notes if "the loss's parts" in note]
    assert all(name in note for name in ("distill.Response", "distill.Feature", "distill.Relation", "the task's loss"))


def test_a_sequence_does_not_run_what_is_trained_along():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))
    for step in (
        distill.Feature(teacher=teacher),
        distill.Mutual(peers=[teacher]),
        distill.SelfDistill(heads=["2"]),
        distill.Relation(teacher=teacher, by="contrastive"),
    ):
        after = fw.compress(model, step, task=task())
        assert list(after.model.state_dict()) == list(model.state_dict())
        assert not torch.equal(after.model[1].weight, model[1].weight)


def test_sums_in_yaml():
    text = """
steps:
- distill.Together: {kinds: [response, {feature: {by: attention, weight: 0.5}}], epochs: 3}
- distill.Response: {by: {"*boxes": error}, teacher: before}
"""
    recipe = fw.Recipe.from_yaml(text)
    assert recipe.steps[0].kinds == (distill.Response(), distill.Feature(by="attention", weight=0.5))
    assert recipe.steps[0] == distill.Response(epochs=3) + distill.Feature(by="attention", weight=0.5)
    assert fw.Recipe.from_yaml(recipe.to_yaml()) == recipe
    with pytest.raises(RecipeError, match="did you mean 'feature'"):
        fw.Recipe.from_yaml("steps: [{distill.Together: {kinds: [featur]}}]")
    with pytest.raises(RecipeError, match="response has no 'temprature'; did you mean 'temperature'"):
        fw.Recipe.from_yaml("steps: [{distill.Together: {kinds: [{response: {temprature: 2}}]}}]")


def test_without_labels_the_calibration_inputs_are_learned_from(trained):
    pruned = fw.compress(trained, prune.Channels(ratio=0.5), task=fw.Task(images(1).tensors[0])).model
    job = fw.Task(images(1).tensors[0], calibration=images(96).tensors[0].split(12))
    step = distill.Response(teacher=trained, epochs=6, options={"lr": 0.02})
    after = fw.compress(pruned, step, task=job)
    assert divergence(after.model, trained) < 0.5 * divergence(pruned, trained)
    assert "trained on the calibration inputs, without labels" in after.ledger.steps[0].notes


def test_layers_that_keep_their_values(trained):
    model = net(6, seed=4)
    after = fw.compress(model, distill.Response(teacher=trained, ignore=("stem", "norm", "head")), task=task())
    now, before = after.model.state_dict(), model.state_dict()
    assert {n for n in now if not torch.equal(now[n], before[n])} == {"down.weight", "down.bias"}
    assert after.ledger.steps[0].left == {"stem": "ignored, as asked", "head": "ignored, as asked"}
    assert all(p.requires_grad for p in after.model.parameters())


# A teacher's answers on disk


class Counted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.model(x)

    def __deepcopy__(self, memo: Any) -> Counted:
        twin = Counted(copy.deepcopy(self.model, memo))
        twin.calls = self.calls  # one account for all copies
        return twin


@pytest.mark.parametrize("kind", [distill.Response, distill.Feature], ids=lambda kind: kind.__name__)
def test_a_cached_teacher_is_asked_once_and_the_result_is_the_same(trained, kind, tmp_path):
    def run(**settings: Any) -> tuple[nn.Module, list[int]]:
        teacher = Counted(trained)
        after = fw.compress(net(2), kind(teacher=teacher, epochs=3, **settings), task=task())
        return after.model, [calls for calls in teacher.calls if calls > 1]  # looks at the example left out

    expected, asked = run()
    cached, once = run(cache=str(tmp_path / "kept"))
    again, never = run(cache=str(tmp_path / "kept"))
    assert asked == [12] * 12
    assert sum(once) == 48
    assert never == []
    for model in (cached, again):
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_another_teacher_does_not_find_the_answers(trained, tmp_path):
    for teacher in (Counted(trained), Counted(net(6, seed=9))):
        fw.compress(net(2), distill.Response(teacher=teacher, cache=str(tmp_path)), task=task())
        assert sum(calls for calls in teacher.calls if calls > 1) == 48
    assert len(list(tmp_path.glob("teacher-*.sqlite"))) == 2


def test_data_that_is_augmented_anew_is_refused_with_the_reason(trained, tmp_path):
    def noisy(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        return x + 0.1 * torch.randn(x.shape), y

    data = torch.utils.data.DataLoader(images(), 12, collate_fn=noisy)
    job = fw.Task.from_loaders(data, loader(), lr=0.01)
    with pytest.raises(TaskError, match="none of the inputs came again in the second epoch: the data is augmented"):
        fw.compress(net(2), distill.Response(teacher=trained, epochs=2, cache=str(tmp_path)), task=job)


# What goes wrong


def test_a_train_that_does_not_use_the_loss_is_found_out(trained):
    job = fw.Task(images(1).tensors[0], train=lambda model, epochs, loss: None)
    for step in (distill.Response(teacher=trained), distill.Mutual(), distill.SelfDistill(), distill.BornAgain()):
        with pytest.raises(TaskError, match="never asked for the loss that it was given"):
            fw.compress(net(2), step, task=job)
    one = fw.Task(images(1).tensors[0], train=lambda model, epochs: None)
    with pytest.raises(RecipeError, match=r"task.train cannot be called as this step would.*epochs, loss\)"):
        fw.compress(net(2), distill.Response(teacher=trained), task=one)
    with pytest.raises(RecipeError, match="unexpected keyword argument 'speed'"):
        fw.compress(net(2), tune.FineTune(options={"speed": 1}), task=one)


def test_a_loss_that_becomes_nan_stops_and_says_where_and_which_part(trained):
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.calls = copy.deepcopy(trained), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += len(x) > 1
            return self.model(x) * (float("nan") if self.calls > 6 else 1.0)

    student, kept = net(2), {}

    def train(model: nn.Module, epochs: float, loss: Any) -> None:
        try:
            fw.fit(model, loader(), epochs, loss, lr=0.02)
        except TaskError:
            kept.update({n: t.clone() for n, t in model.state_dict().items()})
            raise

    job = fw.Task(images(1).tensors[0], train=train, loss="cross_entropy")
    message = r"loss became nan in epoch 2, step 3 of 4: .*after step 4.*Of the loss, distill.Response became NaN"
    with pytest.raises(TaskError, match=message):
        fw.compress(student, distill.Response(teacher=Fails(), epochs=3), task=job)
    good = copy.deepcopy(student)
    fw.fit(good, loader(), 1, lr=0.02)  # of the same order and size as one epoch
    assert all(bool(torch.isfinite(t).all()) for t in kept.values())
    assert any(not torch.equal(t, student.state_dict()[n]) for n, t in kept.items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "yields no batches"),
        ([{"x": images(4).tensors[0], "labels": images(4).tensors[1]}], None),
        ([tuple(images(4).tensors)], None),
        ([images(4).tensors[0]], r"a batch is a float32\[4, 1, 8, 8\]: give"),
        ([{"x": images(4).tensors[0]}], r"a batch has the keys \['x'\]: it needs"),
    ],
)
def test_loaders_of_all_kinds(trained, batches, message):
    def train(model: nn.Module, epochs: float, loss: Any) -> None:
        fw.fit(model, batches, epochs, loss, lr=0.01)

    job = fw.Task(images(1).tensors[0], train=train, loss="cross_entropy")
    step = distill.Response(teacher=trained) + distill.Feature()
    if message is None:
        assert fw.compress(net(2), step, task=job).ledger.steps[0].notes
    else:
        with pytest.raises(TaskError, match=message):
            fw.compress(net(2), step, task=job)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (distill.Response(teacher="orignal"), "teacher is 'orignal': it is 'original', 'before', a network"),
        (distill.Response(teacher=[]), "teacher is an empty list"),
        (distill.Response(epochs=0), "epochs is 0: it must be more than 0"),
        (distill.Response(weight=-1.0), r"weight is -1\.0"),
        (distill.Response(by="kl"), "by is 'kl': use soft_targets, decoupled, dist, error"),
        (distill.Response(temperature=0.0), r"temperature is 0\.0"),
        (distill.Response(teacher=net(3, classes=9)), r"student gives output float32\[1, 3\]"),
        (distill.Response(teacher=nn.Linear(2, 3)), "the teacher, a Linear, cannot run on the example"),
        (distill.Feature(by="hints"), "by is 'hints'"),
        (distill.Feature(layers=["blok*"]), "'blok.' matches none of the 5 layers"),
        (distill.Feature(by="simkd", layers=["head"]), "leave layers= out"),
        (distill.Relation(embedding=0), "embedding is 0"),
        (distill.Mutual(by="kl"), "by is 'kl': use soft_targets"),
        (distill.BornAgain(by={"*": "kl"}), "by is 'kl': use soft_targets"),
        (distill.Together(kinds=[]), "kinds is empty"),
        (distill.Together(kinds=[3]), "kinds holds 3"),
        (distill.Response(epochs=2) + distill.Feature(epochs=3), "epochs is 3 in distill.Feature, and 2 for all"),
        (distill.Mutual(peers=0), "peers is 0"),
        (distill.Mutual(peers="teacher"), "peers is 'teacher'"),
        (distill.SelfDistill(heads=0), "heads is 0"),
        (distill.SelfDistill(alpha=1.5), r"alpha is 1\.5"),
        (distill.BornAgain(generations=0), "generations is 0"),
        (tune.FineTune(ignore=("sten",)), "'sten' matches none of .*did you mean 'stem'"),
        (tune.FineTune(options=[1]), "options is .1,.: it is a mapping"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(step, message):
    with pytest.raises(RecipeError, match=message):
        fw.compress(net(2), step, task=task())


def test_a_step_needs_something_to_train_with():
    bare = fw.Task(images(1).tensors[0])
    for step in (tune.FineTune(), distill.Response(), distill.Mutual(), distill.SelfDistill(), distill.BornAgain()):
        with pytest.raises(RecipeError, match=r"give Task\(train="):
            fw.compress(net(2), step, task=bare)
    watched = fw.Task(images(1).tensors[0], calibration=images().tensors[0].split(8))
    with pytest.raises(RecipeError, match=r"without Task.train=.* there are no labels"):
        fw.compress(net(2), distill.Response(hard=1.0), task=watched)


# Learning from one another, and from oneself


def test_mutual_learning_is_what_the_paper_says():
    student, peer = net(2).train(), net(4, seed=1)
    x, y = images(12).tensors
    from featherweight.batch import as_inputs
    from featherweight.distill.mutual import MutualLoss

    loss = MutualLoss(student, [peer], distill.Response(temperature=1.0), 0.5, as_inputs(x[:1]))
    student.drop.p = peer.drop.p = 0.0
    value = loss(student(x), y)
    value.backward()
    a, b = student(x), peer(x)

    def kl(given: Tensor, right: Tensor) -> Tensor:
        return F.kl_div(given.log_softmax(1), right.softmax(1).detach(), reduction="batchmean")

    expected = F.cross_entropy(a, y) + F.cross_entropy(b, y) + 0.5 * (kl(a, b) + kl(b, a))
    assert torch.allclose(value, expected)
    assert all(p.grad is not None and p.grad.any() for p in (student.head.weight, peer.head.weight))
    loss.close()
    assert not student._forward_hooks


def test_peers_are_gone_afterwards_and_given_ones_untouched(trained):
    other = net(4, seed=5)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    after = fw.compress(net(2), distill.Mutual(peers=[other, "original"], epochs=2), task=task())
    assert list(after.model.state_dict()) == list(net(2).state_dict())
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    assert after.ledger.steps[0].settings["peers"][1] == "original"
    with pytest.raises(TaskError, match="peer 1, a Linear, cannot run"):
        fw.compress(net(2), distill.Mutual(peers=nn.Linear(2, 2)), task=task())


def test_heads_stand_at_the_ends_of_stages_and_are_gone_afterwards():
    after = fw.compress(net(2), distill.SelfDistill(epochs=2), task=task())
    assert list(after.model.state_dict()) == list(net(2).state_dict())
    assert "heads stood on norm" in after.ledger.steps[0].notes
    named = fw.compress(net(2), distill.SelfDistill(heads=["stem", "down"]), task=task())
    assert "heads stood on stem, down" in named.ledger.steps[0].notes
    with pytest.raises(TaskError, match="matches none of the 5 layers"):
        fw.compress(net(2), distill.SelfDistill(heads=["block"]), task=task())


def test_a_new_generation_starts_anew(trained):
    starts = []

    def train(model: nn.Module, epochs: float, loss: Any) -> None:
        starts.append({n: t.clone() for n, t in model.state_dict().items()})
        fw.fit(model, loader(), epochs, loss, lr=0.05)

    job = fw.Task(images(1).tensors[0], evaluate=lambda m: 0.5, train=train, loss="cross_entropy")
    after = fw.compress(trained, distill.BornAgain(generations=2, epochs=3), task=job)
    assert len(starts) == 2
    for start in starts:
        assert not torch.equal(start["stem.weight"], trained.stem.weight)
        assert not start["norm.running_mean"].any()
    assert not torch.equal(starts[0]["stem.weight"], starts[1]["stem.weight"])
    assert any(note == "generation 1 scored 0.5" for note in after.ledger.steps[0].notes)


def test_what_does_not_know_how_to_begin_anew_is_named():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = net(2), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

    model = nn.Sequential(Scaled())
    after = fw.compress(model, distill.BornAgain(), task=task())
    assert any("kept their values" in note and "0" in note for note in after.ledger.steps[0].notes)


def test_the_teachers_last_layer_takes_the_students_place(trained):
    """SimKD: afterwards the student's answers are the teacher's classifier on the adapted features."""
    kept: dict[str, Any] = {}

    def train(model: nn.Module, epochs: float, loss: Any) -> None:
        fw.fit(model, loader(), epochs, loss, lr=0.05)
        kept["adapter"] = copy.deepcopy(getattr(model, ATTACHED)[0].adapter)

    job = fw.Task(images(1).tensors[0], train=train)
    after = fw.compress(
        net(2), distill.Feature(teacher=trained, by="simkd", hard=0.0, epochs=10), task=job
    ).model.eval()
    x, _ = images(12).tensors
    with torch.no_grad():
        features = after.down(after.norm(after.stem(x)).relu()).relu().mean((2, 3))
        expected = trained.head(kept["adapter"](features))
        torch.testing.assert_close(after(x), expected, atol=1e-5, rtol=1e-4)
    assert after.head.weight.shape == (3, 4)
    assert divergence(after, trained) < divergence(net(2), trained)


def test_a_last_layer_that_is_not_to_be_trained_is_not_replaced(trained):
    model = net(2)
    model.head.bias.requires_grad_(False)
    with pytest.raises(RecipeError, match="simkd puts another layer in the place of head, which is not to be trained"):
        fw.compress(model, distill.Feature(teacher=trained, by="simkd"), task=task())
    with pytest.raises(TaskError, match="simkd puts another layer in the place of head, which is not to be trained"):
        fw.compress(net(2), distill.Feature(teacher=trained, by="simkd", ignore=("head",)), task=task())


def test_a_loss_of_the_users_own_serves_all_kinds():
    def smoothed(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target, label_smoothing=0.1)

    job = fw.Task.from_loaders(loader(), loader(96), smoothed, lr=0.02)
    kinds = {"by": "soft_targets"}
    for step in (distill.Response(**kinds), distill.Mutual(**kinds), distill.BornAgain(**kinds), distill.SelfDistill()):
        assert fw.compress(net(2), step, task=job).ledger.steps[0].notes


def test_fine_tuning_is_the_tasks_own_training(trained):
    model = net(4, seed=2)
    after = fw.compress(model, tune.FineTune(epochs=3, options={"lr": 0.03}), task=task())
    expected = copy.deepcopy(model)
    fw.fit(expected, loader(), 3, lr=0.03)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor), name


def test_training_may_come_after_any_stage():
    recipe = fw.Recipe(distill.Response(), factorize.SVD(ratio=0.5), tune.FineTune(), prune.Channels(ratio=0.1))
    assert recipe.problems(net(4), task()) == []
