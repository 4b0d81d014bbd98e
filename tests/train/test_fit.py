"""The default loop: against one written by hand, killed and resumed, on two processes, with everything wrong."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fit_on_processes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from featherweight.errors import ArtifactError, FeatherweightError, TaskError
from featherweight.train.fit import evaluate_loader, fit, split_target
from featherweight.train.processes import share_of


def classified(samples: int = 96) -> TensorDataset:
    """Points whose class is their greatest coordinate: a linear layer learns it."""
    points = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(points, points[:, :3].argmax(1))


def noisy_collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Augments with all three libraries' random numbers."""
    points, labels = zip(*samples, strict=True)
    noise = torch.randn(6) * np.random.rand() + random.random()
    return torch.stack(points) + 0.1 * noise, torch.stack(labels)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))


def shuffled(**settings: object) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(classified(), 8, shuffle=True, collate_fn=noisy_collate, **settings)  # type: ignore[arg-type]


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# What it computes


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as Python has it, however the tests were started: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [  # 8 steps, two of warm-up to the peak of 0.1; the n-th step is n/9 of the way
        ("constant", lambda n: 0.1 * min(1, n / 9 / 0.25)),
        ("one-cycle", lambda n: 0.1 * min(n / 9 / 0.25, (1 - n / 9) / 0.75)),
        ("cosine", lambda n: 0.1 * (n / 9 / 0.25 if n < 3 else (1 + np.cos(np.pi * (n / 9 - 0.25) / 0.75)) / 2)),
        (lambda share: 0.5, lambda n: 0.1 * (n / 9 / 0.25 if n < 3 else 0.5)),
    ],
)
def test_equals_a_loop_written_by_hand(schedule, rates):
    batches = [(x, y) for x, y in DataLoader(classified(32), 8)]
    torch.manual_seed(0)
    ours = nn.Linear(6, 3)
    torch.manual_seed(0)
    theirs = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    for step, (x, y) in enumerate(batches * 2, start=1):
        loss = F.cross_entropy(theirs(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.param_groups[0]["lr"] = rates(step)
        optimizer.step()
        losses.append(float(loss.detach()))

    history = fit(ours, batches, epochs=2, lr=0.1, schedule=schedule, warm_up=0.25, clip=0.3)

    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
    assert torch.allclose(ours.bias, theirs.bias, atol=1e-6)
    assert history.losses == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])])
    assert history.steps == 8
    assert history.seconds > 0
    assert all(p.grad is None for p in ours.parameters())


def test_learns_and_evaluates():
    model, loader = network(), shuffled()
    before = evaluate_loader(model, loader)
    history = fit(model, loader, epochs=12, lr=0.05)
    points, labels = classified().tensors
    right = float((model.eval()(points).argmax(1) == labels).float().mean())
    assert evaluate_loader(model, DataLoader(classified(), 7)) == pytest.approx(right)
    assert right > 0.9 > before
    assert history.losses[-1] < history.losses[0] / 2


def test_parts_of_an_epoch():
    loader = DataLoader(classified(96), 8)
    assert fit(network(), loader, epochs=0.5).steps == 6
    history = fit(network(), loader, epochs=1.25)
    assert history.steps == 15
    assert len(history.losses) == 2


def test_no_epochs_change_nothing():
    model, untouched = network(), network()
    history = fit(model, shuffled(), epochs=0)
    assert (history.losses, history.steps, history.seconds) == ((), 0, 0.0)
    assert_equal(model, untouched)


def test_dicts_logits_and_any_optimizer():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, points: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.linear(points))

    points, labels = classified().tensors
    for key in ("labels", "label", "target"):
        model = Named()
        batches = [{"points": x, key: y} for x, y in zip(points.split(16), labels.split(16), strict=True)]
        fit(model, batches, epochs=40, lr=0.1, optimizer=torch.optim.AdamW)
        assert evaluate_loader(model, batches) > 0.9


@pytest.mark.parametrize("loss", ["mse", lambda outputs, target: (outputs - target).abs().mean()])
def test_regression(loss):
    points, _ = classified().tensors
    batches = [(x, y) for x, y in zip(points.split(16), (points @ torch.ones(6, 1)).split(16), strict=True)]
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    fit(model, batches, epochs=30, loss=loss, lr=0.05)
    score = evaluate_loader(model, batches, loss)
    outputs, targets = model(points), points @ torch.ones(6, 1)
    expected = F.mse_loss(outputs, targets) if loss == "mse" else F.l1_loss(outputs, targets)
    assert score == pytest.approx(-expected.item(), rel=1e-4)
    assert score > -0.05


def test_accuracy_leaves_out_what_cross_entropy_ignores():
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    outputs = torch.eye(3)[:, :, None].repeat(1, 1, 2)  # (batch 3, classes 3, positions 2): sample n says class n
    target = torch.tensor([[0, -100], [1, 2], [0, -100]])
    assert evaluate_loader(Same(), [(outputs, target)]) == 2 / 4


def test_accumulated_batches_are_one_batch():
    points, labels = classified(44).tensors
    small, large = ([*zip(points.split(n), labels.split(n), strict=True)] for n in (4, 12))
    ours, theirs = nn.Linear(6, 3), nn.Linear(6, 3)
    theirs.load_state_dict(ours.state_dict())
    history = fit(ours, small, epochs=2, lr=0.1, accumulate=3, clip=0.5)  # 11 batches: the last update is of two
    expected = fit(theirs, large, epochs=2, lr=0.1, clip=0.5)
    assert history.steps == expected.steps == 8
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_optimizers_by_name_and_schedulers_of_pytorch():
    batches = [(x, y) for x, y in DataLoader(classified(32), 8)]
    ours, theirs = nn.Linear(6, 3), nn.Linear(6, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = torch.optim.AdamW(theirs.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for x, y in batches * 2:
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimizer.step()
        scheduler.step()
    step = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
    fit(ours, batches, epochs=2, lr=0.1, optimizer="AdamW", scheduler=step)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_a_plateau_of_the_score_lowers_the_rate():
    rates, scores = [], iter([0.1, 0.2, 0.2, 0.2])
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=0, factor=0.1)

    def log(name: str, value: float, step: int) -> None:
        if name == "rate" and step % 2 == 0:
            rates.append(value)

    settings = {"scheduler": plateau, "scheduler_every": "epoch", "evaluate": lambda model: next(scores), "log": log}
    fit(network(), DataLoader(classified(16), 8), epochs=4, lr=0.1, **settings)
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01])


def test_a_moving_average_ends_up_in_the_model():
    batches = [(x, y) for x, y in DataLoader(classified(32), 8)]
    ours, theirs = network(), network()
    seen = []
    fit(theirs, batches, epochs=1, lr=0.1, schedule="constant", warm_up=0, evaluate=lambda m: 0.0)
    values = [dict(network().state_dict())]

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            values.append({n: t.detach().clone() for n, t in ours.state_dict().items()})

    kind = partial(Recorded, momentum=0.9, nesterov=True, weight_decay=5e-4)
    evaluate = {"evaluate": lambda m: seen.append(m[4].weight.clone()) or 0.0}
    fit(ours, batches, epochs=1, lr=0.1, optimizer=kind, schedule="constant", warm_up=0, ema=0.15, **evaluate)
    assert torch.equal(values[-1]["4.weight"], theirs[4].weight), "the average has no say in the training"
    for name in ("4.weight", "1.running_mean"):
        expected = values[0][name]
        for n, value in enumerate(values[1:], start=1):
            decay = min(0.15, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * value[name]
        assert torch.allclose(ours.state_dict()[name], expected, atol=1e-6), name
    assert torch.equal(seen[0], ours[4].weight), "it is what is evaluated"


def test_the_best_epoch_is_kept_and_patience_ends_the_rest(tmp_path):
    scores, kept = [0.3, 0.9, 0.5, 0.5, 0.99], []

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        kept.append(copy.deepcopy(model.state_dict()))
        return scores[len(kept) - 1]

    model = network()
    history = fit(model, shuffled(), 5, evaluate=evaluate, keep_best=True, patience=2, checkpoint=tmp_path)
    assert history.scores == (0.3, 0.9, 0.5, 0.5)
    assert history.best == 2
    assert history.steps == 48
    for name, tensor in kept[1].items():
        assert torch.equal(model.state_dict()[name], tensor), name
    again = network()
    assert fit(again, shuffled(), 5, evaluate=evaluate, keep_best=True, patience=2, checkpoint=tmp_path).best == 2
    assert_equal(again, model)


def test_what_is_logged():
    said = []
    loader = DataLoader(classified(32), 8)
    fit(network(), loader, 2, lr=0.1, evaluate=lambda model: 0.5, log=lambda *entry: said.append(entry))
    assert [step for name, _, step in said if name == "loss"] == [*range(1, 9)]
    assert [(value, step) for name, value, step in said if name == "score"] == [(0.5, 4), (0.5, 8)]
    assert max(value for name, value, _ in said if name == "rate") <= 0.1


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    written = []
    writer = SimpleNamespace(add_scalar=lambda *entry: written.append(entry), close=lambda: written.append("closed"))
    fake = SimpleNamespace(SummaryWriter=lambda folder: written.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    fit(network(), DataLoader(classified(16), 8), 1, log=tmp_path)
    assert written[0] == str(tmp_path)
    assert written[-1] == "closed"
    assert len(written) == 6
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(FeatherweightError, match=r"pip install 'featherweight\[tensorboard\]'"):
        fit(network(), DataLoader(classified(16), 8), 1, log=tmp_path)


# What it leaves alone


def test_same_seed_same_result_and_the_callers_random_numbers_go_on():
    first, second, other = network(), network(), network()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    fit(first, shuffled(), epochs=1.5, seed=3)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    fit(second, shuffled(), epochs=1.5, seed=3)
    fit(other, shuffled(), epochs=1.5, seed=4)
    assert_equal(first, second)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_frozen_parameters_flags_and_the_model_itself():
    model = network()
    model.eval()
    model[2].train()
    model[0].weight.requires_grad_(False)
    frozen, flags, attributes = model[0].weight.clone(), [m.training for m in model.modules()], set(vars(model))
    fit(model, shuffled(), epochs=1, mixed_precision="bf16")
    assert torch.equal(model[0].weight, frozen)
    assert not model[0].weight.requires_grad
    assert [m.training for m in model.modules()] == flags
    assert set(vars(model)) == attributes  # accelerate's patched forward would be one more
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not model._forward_hooks


def test_another_accelerator_is_not_disturbed():
    from accelerate import Accelerator

    user = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    try:
        for precision in ("no", "bf16", "no"):
            fit(network(), shuffled(), epochs=0.25, mixed_precision=precision)
        assert user.mixed_precision == "bf16"
        assert user.gradient_accumulation_steps == 4
        assert user.state.mixed_precision == "bf16"
        assert Accelerator(cpu=True).mixed_precision == "bf16"  # still the one state of the process
    finally:
        user.state._reset_state(reset_partial_state=True)
        user.gradient_state._reset_state()


def test_bf16_multiplies_in_bf16_and_computes_the_loss_in_float32():
    seen = set()

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.add(y.dtype)
            return y

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        assert outputs.dtype == torch.float32
        return F.cross_entropy(outputs, target)

    fit(Watched(6, 3), shuffled(), epochs=0.25, loss=loss, mixed_precision="bf16")
    assert seen == {torch.bfloat16}


# Killed and resumed


class Killed(Exception):
    pass


def uninterrupted(
    epochs: float, make_loader=shuffled, optimizer=torch.optim.AdamW
) -> tuple[nn.Module, tuple[float, ...]]:
    model = network()
    return model, fit(model, make_loader(), epochs, loss=entropy, optimizer=optimizer).losses


def entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


def failing(step: int, fail):
    """`entropy`, which does something at its `step`-th call."""
    calls = 0

    def entropy(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            fail()
        return F.cross_entropy(outputs, target)

    entropy.__qualname__ = "entropy"
    return entropy


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    def kill() -> None:
        raise Killed

    expected, losses = uninterrupted(3)
    with pytest.raises(TaskError, match="entropy failed"):
        fit(network(), shuffled(), 3, failing(29, kill), optimizer=torch.optim.AdamW, checkpoint=tmp_path)
    resumed = nn.Sequential(*network())  # its values do not matter
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.fill_(9.0)
    counted = failing(10**9, kill)
    history = fit(resumed, shuffled(), 3, counted, optimizer=torch.optim.AdamW, checkpoint=tmp_path)
    assert_equal(resumed, expected)
    assert history.losses == losses
    assert history.steps == 36
    assert counted.__closure__[0].cell_contents == 12  # only the third epoch was run again


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_saves_within_an_epoch(tmp_path, workers):
    def loader():
        generator = torch.Generator().manual_seed(7)
        return shuffled(generator=generator, num_workers=workers, worker_init_fn=seed_worker)

    expected, losses = uninterrupted(2.5, loader)
    settings = {"optimizer": torch.optim.AdamW, "checkpoint": tmp_path}

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    for step in (17, 5):  # the second time within the same epoch
        with pytest.raises(KeyboardInterrupt):
            fit(network(), loader(), 2.5, failing(step, press), **settings)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = network()
    assert fit(resumed, loader(), 2.5, entropy, **settings).losses == losses
    assert_equal(resumed, expected)
    again = network()  # and a finished run is found finished
    assert fit(again, loader(), 2.5, entropy, **settings).losses == losses
    assert_equal(again, expected)


def seed_worker(index: int) -> None:
    np.random.seed(torch.initial_seed() % 2**32)
    random.seed(torch.initial_seed())


def test_averages_schedulers_and_the_best_epoch_are_resumed(tmp_path):
    scores = {"seen": 0}

    def evaluate(model: nn.Module) -> float:
        scores["seen"] += 1
        return -float(model[4].weight.square().sum()) * (1 if scores["seen"] != 2 else -1)

    step = partial(torch.optim.lr_scheduler.StepLR, step_size=5, gamma=0.7)
    settings = {"ema": 0.9, "accumulate": 2, "scheduler": step, "evaluate": evaluate, "keep_best": True}
    expected = network()
    told = fit(expected, shuffled(), 3, entropy, **settings)
    scores["seen"] = 0
    for calls in (15, 14):  # both times in the epoch after the last one saved
        with pytest.raises(TaskError, match="entropy failed"):
            fit(network(), shuffled(), 3, failing(calls, lambda: 1 / 0), checkpoint=tmp_path, **settings)
    resumed = network()
    history = fit(resumed, shuffled(), 3, entropy, checkpoint=tmp_path, **settings)
    assert (history.losses, history.scores, history.best, history.steps) == (told.losses, told.scores, told.best, 18)
    assert_equal(resumed, expected)


def test_ctrl_c_without_a_checkpoint_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt):
        fit(network(), shuffled(), 1, failing(2, lambda: os.kill(os.getpid(), signal.SIGINT)))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    fit(network(), shuffled(), 1, checkpoint=tmp_path)
    with pytest.raises(ArtifactError, match=r"lr was 0\.01 and is 0\.5"):
        fit(network(), shuffled(), 1, lr=0.5, checkpoint=tmp_path)
    with pytest.raises(ArtifactError, match="shapes"):
        fit(nn.Linear(6, 3), shuffled(), 1, checkpoint=tmp_path)


def test_resuming_runs_no_code_from_the_checkpoint(tmp_path):
    fit(network(), shuffled(), 0.1, checkpoint=tmp_path)
    (file,) = tmp_path.iterdir()

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"settings": Evil()}, file)
    with pytest.raises(ArtifactError, match="no checkpoint of a training, or damaged"):
        fit(network(), shuffled(), 0.1, checkpoint=tmp_path)
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ArtifactError, match="no checkpoint of a training, or damaged"):
        fit(network(), shuffled(), 0.1, checkpoint=tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_torn_checkpoint_is_refused(tmp_path):
    fit(network(), shuffled(), 0.1, checkpoint=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="delete it"):
        fit(network(), shuffled(), 0.1, checkpoint=tmp_path)


# What goes wrong


def test_a_loss_that_becomes_nan_puts_the_last_good_values_back():
    bad = [(torch.ones(4, 6), torch.zeros(4).long())] * 10
    bad[7] = (torch.full((4, 6), float("nan")), bad[0][1])
    model, good = network(), network()

    def harmless_first_epoch():
        for epoch in range(3):
            yield [*bad[:7], bad[0], *bad[8:]] if epoch == 0 else bad

    class Loader:
        epochs = harmless_first_epoch()

        def __len__(self) -> int:
            return 10

        def __iter__(self):
            return iter(next(self.epochs))

    with pytest.raises(TaskError, match=r"the loss became nan in epoch 2, step 8 of 10.*after step 10 in all"):
        fit(model, Loader(), epochs=2, schedule="constant", warm_up=0)
    fit(good, bad[:1] * 10, epochs=1, schedule="constant", warm_up=0)
    assert_equal(model, good)


def test_parameters_that_become_infinite_in_the_last_step():
    model = nn.Linear(6, 3)
    before = model.weight.clone()
    batches = [(torch.ones(4, 6), torch.zeros(4))]
    with pytest.raises(TaskError, match="parameters became NaN or infinite in epoch 1, step 1 of 1"):
        fit(model, batches, loss=lambda outputs, target: outputs.sum() * 1e30, lr=1e20)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "yields no batches"),
        (DataLoader([]), "yields no batches"),
        (iter([(1, 2)]), "only once"),
        (7, "the loader is a int"),
        ([torch.ones(2, 6)], r"a batch is a float32\[2, 6\]"),
        ([(torch.ones(2, 6),)], "a batch is a tuple of 1"),
        ([{"points": torch.ones(2, 6)}], r"has the keys \['points'\]"),
        ([{"labels": torch.ones(2, 6)}], "it needs inputs"),
        ([(torch.ones(2, 6), torch.ones(2, 4))], r"cross_entropy failed on outputs float32\[2, 3\] and target"),
        ([("text", "more")], "only integer tensors|TypeError|must be Tensor"),
    ],
)
def test_loaders_that_cannot_be_used(loader, message):
    model, untouched = network(), network()
    with pytest.raises((TaskError, TypeError), match=message):
        fit(model, loader)
    assert_equal(model, untouched)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"loss": "crossentropy"}, "loss is 'crossentropy'"),
        ({"lr": 0.0}, r"lr is 0\.0"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"warm_up": 1.0}, r"warm_up is 1\.0"),
        ({"clip": 0.0}, r"clip is 0\.0"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": -1.0, "seed": -1}, r"lr is -1\.0.*seed is -1"),
        ({"optimizer": "AdamV"}, "optimizer is 'AdamV'; did you mean 'adam"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR, "schedule": "cosine"}, "schedule and scheduler both"),
        ({"scheduler_every": "batch"}, "scheduler_every is 'batch'"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"ema": 1.0}, r"ema is 1\.0"),
        ({"patience": 0}, "patience is 0"),
        ({"evaluate": lambda model: float("nan")}, r"evaluate\(model\) returned nan"),
        ({"evaluate": lambda model: 1 / 0}, r"evaluate\(model\) raised ZeroDivisionError"),
        ({"loss": "mse"}, "mse needs outputs and targets alike"),
        ({"loss": lambda outputs, target: outputs}, "must give a scalar"),
        ({"loss": lambda outputs, target: outputs.detach().mean()}, "depends on no trainable parameter"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(TaskError, match=message):
        fit(network(), shuffled(), **settings)


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(FeatherweightError, match=r"pip install 'featherweight\[train\]'"):
        fit(network(), shuffled())
    assert fit(network(), shuffled(), epochs=0).steps == 0


def test_nothing_to_train():
    with pytest.raises(TaskError, match="ReLU has no trainable parameter"):
        fit(nn.ReLU(), shuffled())


def test_what_cannot_be_evaluated():
    with pytest.raises(TaskError, match="nothing to evaluate on"):
        evaluate_loader(network(), [])
    with pytest.raises(TaskError, match=r"one class too few|needs outputs \(batch, classes, ...\)"):
        evaluate_loader(nn.Flatten(0), [(torch.ones(4, 1), torch.ones(4).long())])
    with pytest.raises(TaskError, match="loss is 'accuracy'"):
        evaluate_loader(network(), shuffled(), "accuracy")


def test_a_loader_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(classified(40))

    with pytest.raises(TypeError):
        len(DataLoader(Stream(), 8))
    assert fit(network(), DataLoader(Stream(), 8), epochs=1.4).steps == 7


def test_split_target_keeps_several_inputs():
    inputs, target = split_target([torch.ones(1), torch.ones(2), torch.ones(3)])
    assert [len(t) for t in inputs.args] == [1, 2]
    assert len(target) == 3


# On two processes


def test_two_processes_end_as_one(tmp_path):
    with socket.socket() as found:  # a port nobody listens on
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    script = Path(__file__).with_name("fit_on_processes.py")
    running = []
    for rank in range(2):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONWARNINGS": "error::UserWarning"}
        environment = os.environ | {name: str(value) for name, value in told.items()}
        command = [sys.executable, str(script), str(tmp_path)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said

    alone = fit_on_processes.train_all(tmp_path / "alone")
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    del alone["norm"]  # each process normalizes by its own half of a batch
    for name, (values, losses) in alone.items():
        for other, other_losses in (both[0][name], both[1][name]):
            near = 1e-5 if name != "distilled" else 1e-3
            assert other_losses == pytest.approx(losses, abs=near), name
            assert torch.allclose(other, values, atol=near), name
    for first, second in zip(both[0].values(), both[1].values(), strict=True):
        assert torch.equal(first[0], second[0])


def test_a_loader_that_is_shared_out_already():
    sampler = DistributedSampler(classified(), num_replicas=2, rank=0)
    with pytest.raises(TaskError, match="shared out among processes already"):
        share_of(DataLoader(classified(), 8, sampler=sampler), 0, 2)
