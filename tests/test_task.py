"""What a task takes, and what it says of what it cannot take."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from counting import Counting
from networks import Mixed, Residual, Transformer, assert_same_state, make, task_of
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

import featherweight as fw
from featherweight import factorize, quantize
from featherweight.batch import Inputs
from featherweight.errors import RecipeError, TaskError
from featherweight.score import Divergence
from featherweight.task import fingerprint


class Two(nn.Module):
    """Takes two inputs, by place or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


def problem(model: Any, **fields: Any) -> str:
    """The one problem there is."""
    found = fw.Task(**fields).problems(model)
    assert len(found) == 1, found
    return found[0]


X = Mixed.data(8)


# What it takes


@pytest.mark.parametrize(
    ("model", "example", "batch"),
    [
        (make(Mixed), X[:1], X[:4]),
        (make(Mixed), (X[:1],), [X[:4]]),
        (make(Mixed), X[:1], (X[:4], torch.zeros(4))),  # with labels
        (Two(), (torch.ones(1, 3), torch.ones(1, 1)), (torch.ones(4, 3), torch.ones(4, 1), torch.zeros(4))),
        (
            Two(),
            {"x": torch.ones(1, 3), "scale": torch.ones(1, 1)},
            {"scale": torch.ones(4, 1), "x": torch.ones(4, 3), "labels": 1},
        ),
        (
            Two(),
            Inputs((torch.ones(1, 3),), {"scale": torch.ones(1)}),
            Inputs((torch.ones(4, 3),), {"scale": torch.ones(1)}),
        ),
        (make(Mixed).double(), X[:1], X[:4]),  # float32 data is given in the model's type
        (make(Transformer), Transformer.data(1), Transformer.data(4)),
    ],
    ids=["tensor", "tuple", "labels", "two", "dict", "inputs", "double", "tokens"],
)
def test_examples_and_batches_of_every_form_run(model, example, batch):
    task = fw.Task(example, calibration=[batch])
    assert task.problems(model) == []
    (inputs,) = task.batches(model)
    assert inputs.into(model).shape[0] == inputs.batch_size == 4


def test_without_calibration_the_example_is_the_data():
    model = make(Mixed)
    (inputs,) = fw.Task(X[:2]).batches(model)
    assert torch.equal(inputs.args[0], X[:2])
    assert not fw.Task(X[:2]).has_calibration


def test_batches_stop_where_enough_samples_were_seen():
    model = make(Mixed)
    sizes = [inputs.batch_size for inputs in fw.Task(X[:1], calibration=X.split(3)).batches(model, samples=4)]
    assert sizes == [3, 3]


# What it cannot take: what, where, what to do


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "calibration is empty: give at least one batch, or leave it out to go without data"),
        (
            "generator",
            "calibration is an iterator, which can be read only once: give a list of batches or a DataLoader",
        ),
        ("tensor", r"calibration is one tensor: give batches of it, such as calibration=images.split(64)"),
        (5, "calibration is a int: give an iterable of batches"),
        ("raises", "calibration raised OSError at its first batch: the disk is gone"),
        ("augmented", "give a loader with shuffle=False and no augmentation, or a list of its batches"),
        ([X[:, :5]], "Mixed (float32) cannot run on the first calibration batch (float32[8, 5]): RuntimeError: "),
        ([{"x": X}], "the first calibration batch: a batch is a dict with ['x'] but the example is positional"),
        (
            [X * float("nan")],
            "the first calibration batch (float32[8, 12]) holds NaN or infinite values: clean the data",
        ),
        ([X[:0]], "the first calibration batch (float32[0, 12]) is empty: give at least one sample"),
    ],
    ids=["empty", "generator", "tensor", "number", "raises", "augmented", "shape", "dict", "nan", "no samples"],
)
def test_calibration_that_cannot_be_used(given, message):
    class Raises:
        def __iter__(self) -> Iterator[Tensor]:
            raise OSError("the disk is gone")

    made = {
        "generator": (batch for batch in X.split(4)),
        "tensor": X,
        "raises": Raises(),
        "augmented": DataLoader(TensorDataset(X), 4, collate_fn=lambda rows: torch.rand(4, 12)),
    }
    calibration = made[given] if isinstance(given, str) else list(given) if given == () else given
    assert message in problem(make(Mixed), example=X[:1], calibration=calibration)


def test_an_empty_batch_further_on_is_said_where_it_is_read():
    task = fw.Task(X[:1], calibration=[X, X[:0]])
    with pytest.raises(TaskError, match=r"calibration batch 2 \(float32\[0, 12\]\) is empty: leave such batches out"):
        list(task.batches(make(Mixed)))


def test_what_is_no_task_is_said_by_all_that_take_one():
    model = make(Mixed)
    for call in (
        lambda: fw.compress(model, quantize.Weights(bits=8), task=X),
        lambda: fw.sensitivity(model, X),
        lambda: fw.compare(model, model, X),
    ):
        with pytest.raises((RecipeError, TaskError), match=r"the task is a Tensor: give featherweight.Task\(example="):
            call()


class Ragged(nn.Module):
    """A layer behind a choice of rows: (rows, 4) → (some of them, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return self.two(x[x[:, 0] > 0])


def test_shapes_that_depend_on_values_are_said_to():
    model, x = make(Ragged), torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    task = fw.Task(x[:8], calibration=x.split(16), loss="mse")
    with pytest.raises(TaskError, match=r"Linear\(in_features=8.*number depends on values.*leave the layer out"):
        fw.compress(model, quantize.Weights(bits=2), task=task)
    other = make(Ragged, seed=1)
    with pytest.raises(TaskError, match="shapes that depend on values cannot be compared"):
        Divergence(model, task)(other)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "Mixed (float32) cannot run on example (NoneType): TypeError: "),
        (X[:1, :3], "Mixed (float32) cannot run on example (float32[1, 3]): RuntimeError: "),
        (X[:1].long(), "Mixed (float32) cannot run on example (int64[1, 12]): RuntimeError: "),
        ((X[:1], X[:1]), "cannot run on example (float32[1, 12], float32[1, 12]): TypeError: "),
        ({"y": X[:1]}, "cannot run on example (y=float32[1, 12]): TypeError: "),
        (X[:1] / 0, "example (float32[1, 12]) holds NaN or infinite values: clean the data"),
    ],
    ids=["none", "shape", "type", "two", "name", "infinite"],
)
def test_an_example_that_cannot_be_used(example, message):
    said = problem(make(Mixed), example=example)
    assert message in said
    assert "clean the data" in said or said.endswith("give inputs of the shape and type that model(...) takes")


def test_a_batch_with_fewer_inputs_or_other_keys_than_the_example():
    pair = (torch.ones(1, 3), torch.ones(1, 1))
    named = dict(zip(("x", "scale"), pair, strict=True))
    assert "a batch has 1 inputs but the example has 2" in problem(Two(), example=pair, calibration=[pair[:1]])
    said = problem(Two(), example=named, calibration=[{"x": pair[0]}])
    assert "a batch has the keys ['x'] but the example needs ['scale'] too" in said
    said = problem(Two(), example=named, calibration=[pair])
    assert "a batch is a tuple but the example is a dict with ['scale', 'x']" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value):
    model = make(Residual)
    with torch.no_grad():
        model.one.weight[0, 0, 0, 0] = value
    said = problem(model, example=Residual.data(1))
    assert said == "NaN or infinite values in one.weight: the model is damaged; load or train it again"
    model = make(Residual)
    model.one_norm.running_mean[2] = float("nan")
    assert "NaN or infinite values in one_norm.running_mean" in problem(model, example=Residual.data(1))
    model = make(Residual)
    model.one_norm.running_var[2] = float("inf")
    assert "NaN or infinite values in one_norm.running_var" in problem(model, example=Residual.data(1))


def test_a_buffer_may_hold_infinities():
    model = make(Mixed)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    assert fw.Task(X[:1]).problems(model) == []


@pytest.mark.parametrize(
    "kind", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool], ids=str
)
def test_tensors_of_every_type_can_be_looked_at(kind):
    model = make(Mixed)
    model.register_buffer("other", torch.ones(2).to(kind))
    assert fw.Task(X[:1]).problems(model) == []


def test_models_without_values_or_shapes_are_refused():
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(12, 2))
    assert "0.weight, 0.bias are on the meta device, without values: load" in problem(empty, example=X[:1])
    lazy = nn.Sequential(nn.LazyLinear(2))
    assert "0.weight, 0.bias have no shape yet: call the model once on an example" in problem(lazy, example=X[:1])


def test_a_model_that_answers_nan_or_nothing():
    class Divides(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0

    class Silent(Mixed):
        def forward(self, x: Tensor) -> None:
            super().forward(x)

    assert "answer to example (float32[1, 12]) holds NaN or infinite values" in problem(make(Divides), example=X[:1])
    assert problem(make(Silent), example=X[:1]) == "the model's answer to example holds no tensors"


def test_what_is_no_model_is_said():
    assert problem(lambda x: x, example=X) == "the model is a function, not an nn.Module"
    assert problem(Mixed, example=X) == "the model is the class Mixed, not an nn.Module"


def test_a_model_that_cannot_be_copied_is_said():
    model = make(Mixed)
    model.lock = threading.Lock()
    said = problem(model, example=X[:1])
    assert said.startswith("Mixed cannot be copied (TypeError: cannot pickle '_thread.lock' object)")
    assert said.endswith("make it work with copy.deepcopy")


def test_functions_and_losses_that_are_none():
    assert problem(make(Mixed), example=X[:1], evaluate=0.5) == "evaluate is a float, not a function"
    assert problem(make(Mixed), example=X[:1], train="fit") == "train is a str, not a function"
    said = "loss is {}: use 'cross_entropy', 'mse' or a function (outputs, target) -> scalar"
    for loss in ("crossentropy", 5):
        assert problem(make(Mixed), example=X[:1], loss=loss) == said.format(repr(loss))


def test_all_problems_are_said_at_once():
    model = make(Mixed)
    torch.nn.init.constant_(model.first.weight, float("nan"))
    task = fw.Task(X[:1], calibration=X, evaluate=1, loss="mae")  # type: ignore[arg-type]
    assert [said.split()[0] for said in task.problems(model)] == ["NaN", "evaluate", "loss", "calibration"]


def test_looking_for_problems_changes_nothing():
    model = make(Counting).train()
    before, random = copy.deepcopy(model), torch.random.get_rng_state()
    assert fw.Task(X[:1], calibration=[X]).problems(model) == []
    assert_same_state(model, before)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)


# Loaders


@pytest.mark.parametrize("kind", ["shuffle", "generator", "sampler", "batch sampler", "workers"])
def test_a_loader_that_shuffles_is_read_in_one_order(kind):
    rows = TensorDataset(torch.arange(64.0)[:, None].expand(64, 12), torch.zeros(64))
    generator = torch.Generator().manual_seed(7)
    samplers = BatchSampler(RandomSampler(rows), 8, drop_last=False)
    loader = {
        "shuffle": lambda: DataLoader(rows, 10, shuffle=True, drop_last=True),
        "generator": lambda: DataLoader(rows, 10, shuffle=True, drop_last=True, generator=generator),
        "sampler": lambda: DataLoader(rows, 10, sampler=SubsetRandomSampler(range(64)), drop_last=True),
        "batch sampler": lambda: DataLoader(rows, batch_sampler=samplers),
        "workers": lambda: DataLoader(rows, 32, shuffle=True, num_workers=1),
    }[kind]()
    model, random, state = make(Mixed), torch.random.get_rng_state(), generator.get_state()
    task = fw.Task(X[:1], calibration=loader)
    assert task.problems(model) == []
    first, again = ([inputs.args[0] for inputs in task.batches(model)] for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert [len(batch) for batch in first] == {"batch sampler": [8] * 8, "workers": [32] * 2}.get(kind, [10] * 6)
    seen = torch.cat(first)[:, 0]
    assert len(seen.unique()) == len(seen)
    assert not torch.equal(seen, seen.sort().values)
    assert fw.Task(X[:1], calibration=loader).fingerprint() == task.fingerprint(), "so that a run can be taken up again"
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(generator.get_state(), state)


def test_a_loader_in_order_is_read_as_it_is():
    loader = DataLoader(TensorDataset(X, torch.zeros(len(X))), 3)
    batches = [inputs.args[0] for inputs in fw.Task(X[:1], calibration=loader).batches(make(Mixed))]
    assert torch.equal(torch.cat(batches), X)


def test_a_model_is_compressed_on_a_loader_that_shuffles():
    model = make(Mixed)
    loader = DataLoader(TensorDataset(Mixed.data(48)), 16, shuffle=True)
    small, again = (
        fw.compress(model, factorize.SVD(budget=fw.Budget(macs=0.6)), task=fw.Task(X[:1], calibration=loader))
        for _ in range(2)
    )
    assert_same_state(small.model, again.model)


def test_from_loaders_fills_in_everything():
    labels = X[:, :4].argmax(1)
    loader = DataLoader(TensorDataset(X, labels), 3)
    model = make(Mixed)
    task = fw.Task.from_loaders(loader, loader, lr=0.5, calibration_samples=5)
    assert task.problems(model) == []
    assert [inputs.batch_size for inputs in task.batches(model)] == [3, 3]
    assert task.inputs().batch_size == 1
    assert task.evaluate is not None
    assert task.train is not None
    right = float((model(X).argmax(1) == labels).double().mean())
    assert task.evaluate(model) == pytest.approx(right)
    before = copy.deepcopy(model)
    task.train(model, 1)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_from_loaders_of_dicts_and_for_regression():
    batches = [{"x": torch.ones(4, 3), "scale": torch.ones(4, 1), "labels": torch.zeros(4, 2)}]
    task = fw.Task.from_loaders(None, batches, loss="mse")
    model = Two()
    assert task.problems(model) == []
    assert task.train is None
    assert set(task.inputs().kwargs) == {"x", "scale"}
    assert task.evaluate is not None
    with torch.no_grad():
        assert task.evaluate(model) == pytest.approx(
            -float(model(**{k: batches[0][k] for k in ("x", "scale")}).square().mean())
        )


def test_from_loaders_refuses_what_it_cannot_use():
    with pytest.raises(TaskError, match="yields no batches"):
        fw.Task.from_loaders([], [])
    with pytest.raises(TaskError, match="fit has no setting 'optimiser'; did you mean 'optimizer'"):
        fw.Task.from_loaders([(X, X)], [(X, X)], optimiser="adam")


# Fingerprints


def test_models_are_told_apart_by_form_and_values():
    model = make(Mixed)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == fingerprint(make(Mixed).train())
    other = make(Mixed)
    with torch.no_grad():
        other.first.bias[0] += 1
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(model) != fingerprint(make(Mixed).double())


def accuracy(model: nn.Module, data: Tensor, times: float = 1.0) -> float:
    return float(model(data).mean()) * times


def on_all(model: nn.Module) -> float:
    return accuracy(model, X)


def on_some(model: nn.Module) -> float:
    return accuracy(model, LATER)


LATER = X[4:]


def test_tasks_are_told_apart_by_data_and_code():
    def closed_over(data: Tensor, times: float = 1.0):
        def evaluate(model: nn.Module) -> float:
            return max(accuracy(model, data, t) for t in (times, times))

        return evaluate

    def recursive(model: nn.Module, depth: int = 2) -> float:
        return recursive(model, depth - 1) if depth else 0.0

    class Callable_:
        def __call__(self, model: nn.Module) -> float:
            return 1.0

    tasks = {
        "nothing": fw.Task(X[:1]),
        "example": fw.Task(X[1:2]),
        "calibration": fw.Task(X[:1], calibration=[X]),
        "loss": fw.Task(X[:1], loss="mse"),
        "all": fw.Task(X[:1], evaluate=on_all),
        "some": fw.Task(X[:1], evaluate=on_some),
        "train": fw.Task(X[:1], train=on_all),
        "partial": fw.Task(X[:1], evaluate=functools.partial(accuracy, data=X)),
        "another partial": fw.Task(X[:1], evaluate=functools.partial(accuracy, data=LATER)),
        "closure": fw.Task(X[:1], evaluate=closed_over(X)),
        "another closure": fw.Task(X[:1], evaluate=closed_over(LATER)),
        "a closure's number": fw.Task(X[:1], evaluate=closed_over(X, 2.0)),
        "recursive": fw.Task(X[:1], evaluate=recursive),
        "object": fw.Task(X[:1], evaluate=Callable_()),
        "a lambda": fw.Task(X[:1], evaluate=lambda model: 1.0),
        "another lambda": fw.Task(X[:1], evaluate=lambda model: 2.0),
    }
    seen = {name: task.fingerprint() for name, task in tasks.items()}
    assert len(set(seen.values())) == len(tasks)
    assert fw.Task(X[:1], evaluate=closed_over(X.clone())).fingerprint() == seen["closure"]
    assert fw.Task(X[:1], evaluate=Callable_()).fingerprint() == seen["object"]


def test_a_task_of_a_network_can_be_made_in_one_line():
    assert task_of(make(Residual)).problems(make(Residual)) == []
