"""Tasks out of Lightning modules and Hugging Face trainers: by stand-ins that do what those do, and by the real."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import featherweight as fw
from featherweight import distill, factorize, tune
from featherweight.errors import TaskError


def data(samples: int = 64) -> TensorDataset:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))


class Steps:
    """What a user's module has beside its base class."""

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)  # type: ignore[operator]
        self.log("train_loss", loss)  # type: ignore[attr-defined]
        return {"loss": loss}

    def validation_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        answers = self(x)  # type: ignore[operator]
        self.log_dict({"val_acc": (answers.argmax(1) == y).float().mean()})  # type: ignore[attr-defined]
        return F.cross_entropy(answers, y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)  # type: ignore[attr-defined]
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]


class StandIn(Steps, nn.Module):
    """A Lightning module without Lightning, whose `log` fails as its does without a trainer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def log(self, *_: Any, **__: Any) -> None:
        raise AssertionError("there is no trainer to log to")

    log_dict = log


class Data:
    def __init__(self) -> None:
        self.said: list[str] = []

    def prepare_data(self) -> None:
        self.said.append("prepared")

    def setup(self, stage: str) -> None:
        self.said.append(stage)

    def train_dataloader(self) -> Any:
        return DataLoader(data(), 16, shuffle=True)

    def val_dataloader(self) -> Any:
        return [DataLoader(data(), 10)]


def test_a_lightning_module_trains_by_its_own_steps():
    module, datamodule = StandIn(), Data()
    task = fw.Task.from_lightning(module, datamodule, score="val_acc")
    assert datamodule.said == ["prepared", "fit"]
    assert [t.shape for t in task.inputs().tensors()] == [(1, 6)]
    x, y = data().tensors
    right = float((module(x).argmax(1) == y).float().mean())
    assert task.evaluate(module) == pytest.approx(right)
    small = fw.compress(module, factorize.SVD(ratio=0.6), tune.FineTune(epochs=6), task=task)
    first, second = small.ledger.steps
    assert second.after.score > first.after.score
    assert "log" not in vars(small.model)

    # The same by hand, with the module's own optimizer and scheduler.
    ours, theirs = copy.deepcopy(module), copy.deepcopy(module)
    batches = list(DataLoader(data(), 16))
    datamodule.train_dataloader = lambda: batches
    fw.Task.from_lightning(module, datamodule).train(ours, 2)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for x, y in batches * 2:
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimizer.step()
        scheduler.step()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_a_lightning_module_learns_from_a_teacher_with_its_own_loss():
    teacher = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 3))
    fw.fit(teacher, DataLoader(data(), 16), 20, lr=0.1)
    task = fw.Task.from_lightning(StandIn(), Data(), score="val_acc")
    step = distill.Response(teacher=teacher, epochs=3, hard=0.5, by="soft_targets") + distill.Feature(
        layers={"net.1": "1"}
    )
    after = fw.compress(StandIn(), step, task=task)
    (note,) = [note for note in after.ledger.steps[0].notes if "the loss's parts" in note]
    assert "the task's loss" in note
    assert after.ledger.steps[0].after.score > after.ledger.steps[0].before.score
    with pytest.raises(TaskError, match="does not say what the targets are"):
        fw.compress(StandIn(), distill.Mutual(), task=task)


def test_scores_of_a_lightning_module():
    module = StandIn()
    x, y = data().tensors
    loss = float(F.cross_entropy(module(x), y).detach())
    assert fw.Task.from_lightning(module, Data()).evaluate(module) == pytest.approx(-loss)
    with pytest.raises(TaskError, match=r"logs no 'accuracy': it logs \['val_acc'\]"):
        fw.Task.from_lightning(module, Data(), score="accuracy").evaluate(module)


def test_metrics_that_gather_are_asked_in_the_end():
    class Metric:
        def __init__(self) -> None:
            self.right = self.seen = 0

        def compute(self) -> Tensor:
            return torch.tensor(self.right / self.seen)

        def reset(self) -> None:
            self.right = self.seen = 0

    class Measured(StandIn):
        metric = Metric()

        def validation_step(self, batch: Any, index: int) -> None:
            x, y = batch
            self.metric.right += int((self(x).argmax(1) == y).sum())
            self.metric.seen += len(y)
            self.log("acc", self.metric)

    module = Measured()
    x, y = data().tensors
    right = float((module(x).argmax(1) == y).float().mean())
    assert fw.Task.from_lightning(module, Data(), score="acc").evaluate(module) == pytest.approx(right)
    assert module.metric.seen == 0


def test_lightning_modules_that_cannot_be_used():
    with pytest.raises(TaskError, match="Linear has no training_step and no validation_step"):
        fw.Task.from_lightning(nn.Linear(2, 2), Data())
    with pytest.raises(TaskError, match="gives no loader by train_dataloader"):
        fw.Task.from_lightning(StandIn(), SimpleNamespace())
    with pytest.raises(TaskError, match="fit has no setting 'lrr'; did you mean 'lr'"):
        fw.Task.from_lightning(StandIn(), Data(), lrr=1)

    class Two(StandIn):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1)] * 2

    with pytest.raises(TaskError, match="gives 2 optimizers, and the loop has one"):
        fw.Task.from_lightning(Two(), Data()).train(Two(), 1)
    fw.Task.from_lightning(Two(), Data(), optimizer="AdamW", lr=0.01).train(Two(), 1)

    class Nothing(StandIn):
        def training_step(self, batch: Any, index: int) -> None:
            return None

    with pytest.raises(TaskError, match="training_step returned a NoneType: it must return a loss"):
        fw.Task.from_lightning(Nothing(), Data()).train(Nothing(), 1)


class Named(Dataset[dict[str, Tensor]]):
    """Samples as a Trainer takes them."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = data()[index]
        return {"x": x, "labels": y}


@dataclass
class Output(dict[str, Any]):
    """As transformers' outputs: a mapping whose values are attributes too."""

    loss: Tensor | None
    logits: Tensor

    def __post_init__(self) -> None:
        super().update(loss=self.loss, logits=self.logits)


class Classifier(nn.Module):
    """As models of transformers answer: a loss where there are labels, and logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output(loss, logits)


class Trainer:
    """What this package uses of a Trainer, and no more."""

    def __init__(self, model: nn.Module, args: Any, train_dataset: Any = None, eval_dataset: Any = None) -> None:
        self.model, self.args, self.train_dataset, self.eval_dataset = model, args, train_dataset, eval_dataset

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, 16)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def train(self) -> str:
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), self.args.learning_rate)
        for _ in range(round(self.args.num_train_epochs)):
            for batch in self.get_train_dataloader():
                optimizer.zero_grad()
                self.compute_loss(self.model, batch).backward()
                optimizer.step()
        return "trained"

    def evaluate(self) -> dict[str, float]:
        x, y = data().tensors
        with torch.no_grad():
            answers = self.model(x, y)
        return {"eval_loss": float(answers.loss), "eval_right": float((answers.logits.argmax(1) == y).float().mean())}


def trainer() -> Trainer:
    arguments = SimpleNamespace(num_train_epochs=1, learning_rate=0.2, max_steps=-1, save_strategy="steps")
    return Trainer(Classifier(), arguments, Named(), Named())


def test_a_trainer_trains_and_judges_what_was_made_of_its_model():
    given = trainer()
    before = copy.deepcopy(given.model.state_dict())
    task = fw.Task.from_trainer(given, score="right")
    assert list(task.inputs().kwargs) == ["x"]
    small = fw.compress(given.model, factorize.SVD(ratio=0.6), tune.FineTune(epochs=12), task=task)
    first, second = small.ledger.steps
    assert second.after.score > first.after.score
    assert all(torch.equal(t, before[n]) for n, t in given.model.state_dict().items())
    assert (given.args.num_train_epochs, given.args.save_strategy) == (1, "steps")
    expected = Trainer(copy.deepcopy(given.model), SimpleNamespace(num_train_epochs=2, learning_rate=0.1), Named())
    expected.train()
    ours = copy.deepcopy(given.model)
    task.train(ours, 2, learning_rate=0.1)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    assert fw.Task.from_trainer(given).evaluate(given.model) == -given.evaluate()["eval_loss"]


def test_a_trainer_learns_from_a_teacher_with_its_own_loss():
    given, teacher = trainer(), Classifier()
    fw.fit(teacher, [{"x": x, "labels": y} for x, y in DataLoader(data(), 16)], 20, lr=0.1)
    task = fw.Task.from_trainer(given, score="right")
    step = distill.Response(teacher=teacher, epochs=8, temperature=2.0) + distill.Relation(weight=0.01)
    after = fw.compress(given.model, step, task=task)
    (note,) = [note for note in after.ledger.steps[0].notes if "the loss's parts" in note]
    assert "the task's loss" in note
    assert after.ledger.steps[0].after.score > after.ledger.steps[0].before.score


def test_trainers_that_cannot_be_used():
    given = trainer()
    task = fw.Task.from_trainer(given, score="f1")
    with pytest.raises(TaskError, match="evaluate gives no 'f1': there are"):
        task.evaluate(given.model)
    with pytest.raises(TaskError, match="the trainer's arguments have no lerning_rate"):
        task.train(given.model, 1, lerning_rate=1)
    given.eval_dataset = None
    with pytest.raises(TaskError, match="the Trainer has no eval_dataset"):
        fw.Task.from_trainer(given)


# The packages themselves, where they are installed


@pytest.mark.slow
def test_with_transformers_themselves(tmp_path):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=16, learning_rate=0.02, use_cpu=True, report_to=[]
        )
        given = transformers.Trainer(
            model=Classifier(),
            args=arguments,
            train_dataset=Named(),
            eval_dataset=Named(),
            compute_metrics=lambda said: {"right": float((said.predictions.argmax(1) == said.label_ids).mean())},
        )
        teacher = Classifier()
        fw.fit(teacher, [{"x": x, "labels": y} for x, y in DataLoader(data(), 16)], 20, lr=0.1)
        task = fw.Task.from_trainer(given, score="right")
        steps = [factorize.SVD(ratio=0.6), distill.Response(teacher=teacher, epochs=8), tune.FineTune(epochs=2)]
        small = fw.compress(given.model, *steps, task=task)
    scores = [entry.after.score for entry in small.ledger.steps]
    assert scores[1] > scores[0]
    assert scores[2] > 0.5


@pytest.mark.slow
def test_with_lightning_itself():
    lightning = pytest.importorskip("lightning")

    class Module(Steps, lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    class Module_(lightning.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(data(), 16, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(data(), 10)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Module()
        task = fw.Task.from_lightning(module, Module_(), score="val_acc")
        steps = [factorize.SVD(ratio=0.6), tune.FineTune(epochs=4), distill.Response(epochs=2, by="soft_targets")]
        small = fw.compress(module, *steps, task=task)
    scores = [entry.after.score for entry in small.ledger.steps]
    assert scores[1] > scores[0]
