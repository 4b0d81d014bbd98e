"""What a model is for: an example of its inputs, data to watch it on, and how to judge and to train it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from featherweight.batch import Inputs, as_inputs, copied, describe, dtype_of, mode, tensors_in
from featherweight.errors import TaskError, did_you_mean, first_few

Loss = str | Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Task:
    """What a model is for.

    Attributes:
        example: inputs of one call: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Costs are
            those of this call, so its batch size is the one that costs are quoted for.
        calibration: batches of inputs, labels not needed; an iterable that can be read again and again, such as a
            list, ``images.split(64)`` or a DataLoader. Of a batch (images, labels) as many leading elements are used
            as the example has. A DataLoader that shuffles is read in one order, drawn once and always the same.
        evaluate: ``evaluate(model) -> float``, higher is better. Without it, the score is agreement with the original
            on the calibration data (on the example where there is none): the share of equal top-1 classes for a
            classifier, otherwise 1 − ‖answer − original's‖ / ‖original's‖.
        train: ``train(model, epochs, loss=None)`` fine-tunes the model in place.
        loss: ``"cross_entropy"`` (a classifier), ``"mse"``, or a function (outputs, target) → scalar. None: a model
            with ``.logits``, or one output of shape (samples, classes), is taken for a classifier.
    """

    example: Any
    calibration: Iterable[Any] = ()
    evaluate: Callable[[nn.Module], float] | None = None
    train: Callable[..., Any] | None = None
    loss: Loss | None = None

    @classmethod
    def from_loaders(
        cls,
        train: Iterable[Any] | None,
        test: Iterable[Any],
        loss: Loss = "cross_entropy",
        *,
        calibration_samples: int = 512,
        **settings: Any,
    ) -> Task:
        """A task out of two loaders of (inputs..., target) batches, with the default loop for training.

        Args:
            train: batches to train on, and (the first `calibration_samples` of them) to calibrate on; None where
                there is nothing to train on: then the test inputs calibrate, and nothing can be fine-tuned.
            test: batches to evaluate on: top-1 accuracy for ``"cross_entropy"``, otherwise minus the mean loss.
            loss: ``"cross_entropy"``, ``"mse"`` or a function (outputs, target) → scalar.
            calibration_samples: how many samples to watch.
            settings: further keyword arguments of :func:`featherweight.fit`, such as ``lr``.
        Raises:
            TaskError: a loader yields nothing, or no (inputs..., target) batches, or `fit` has no such setting.
        """
        from featherweight.train.fit import evaluate_loader, fit, split_target

        settings = _settings_of_fit(settings)
        watched: list[Inputs] = []
        samples = 0
        for batch in test if train is None else train:
            inputs, _ = split_target(batch)
            watched.append(inputs)
            samples += inputs.batch_size
            if samples >= calibration_samples:
                break
        if not watched:
            raise TaskError("the loader yields no batches: give it at least one batch of (inputs..., target)")
        own_loss, loader = loss, train if train is not None else ()

        def train_model(model: nn.Module, epochs: float, loss: Loss | None = None, **more: Any) -> Any:
            return fit(model, loader, epochs=epochs, loss=loss or own_loss, **{**settings, **more})

        return cls(
            example=_first_of(watched[0]),
            calibration=watched,
            evaluate=lambda model: evaluate_loader(model, test, own_loss),
            train=None if train is None else train_model,
            loss=loss,
        )

    @classmethod
    def from_lightning(
        cls,
        module: nn.Module,
        datamodule: Any,
        *,
        score: str | None = None,
        loss: Loss | None = None,
        calibration_samples: int = 512,
        **settings: Any,
    ) -> Task:
        """A task out of a Lightning module and its data: trained by its ``training_step``, judged by what it logs.

        Nothing of Lightning is needed, nor its Trainer used: the default loop calls the module's own steps, with the
        optimizer and scheduler of ``configure_optimizers``. ``training_step`` has to call the module itself, as
        ``self(x)``, for a distillation to see what it is called with.

        Args:
            module: the module; the model to compress.
            datamodule: gives ``train_dataloader()``, and ``val_dataloader()`` or ``test_dataloader()``; of a batch as
                many leading elements are inputs as the module's ``forward`` takes without defaults.
            score: the name that ``validation_step`` logs and that is the score, such as ``"val_acc"``; None for minus
                the loss that it returns, or logs as ``val_loss``.
            loss: what the module's loss is, where a step needs to know: ``"cross_entropy"``, ``"mse"`` or a function.
            calibration_samples: how many samples to watch.
            settings: of :func:`featherweight.fit`; with ``optimizer``, ``lr``, ``schedule`` or ``scheduler`` among them
                ``configure_optimizers`` is not asked.
        Raises:
            TaskError: module or data lack what is needed.
        """
        from featherweight.train.adopted import score_lightning, train_lightning

        if missing := [name for name in ("training_step", "validation_step") if not hasattr(module, name)]:
            raise TaskError(f"{type(module).__name__} has no {' and no '.join(missing)}: it is no Lightning module")
        getattr(datamodule, "prepare_data", _nothing)()
        getattr(datamodule, "setup", _nothing)("fit")
        train, test = (_loader_of(datamodule, *names) for names in (("train",), ("val", "test")))
        count = sum(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            for p in inspect.signature(module.forward).parameters.values()
        )
        watched = _watched(train, max(1, count), calibration_samples)
        known = _settings_of_fit(settings)

        def train_module(model: nn.Module, epochs: float, loss: Any = None, **more: Any) -> Any:
            return train_lightning(model, train, epochs, loss, **{**known, **more})

        return cls(
            example=_first_of(watched[0]),
            calibration=watched,
            evaluate=lambda model: score_lightning(model, test, score),
            train=train_module,
            loss=loss,
        )

    @classmethod
    def from_trainer(cls, trainer: Any, *, score: str | None = None, calibration_samples: int = 512) -> Task:
        """A task out of a Hugging Face ``Trainer``: its data, its collator, its arguments, its loss and its metrics.

        Another trainer of its class is made for every training and every score; the given one is not changed.

        Args:
            trainer: has a ``train_dataset`` and an ``eval_dataset``; its model is what to compress.
            score: the name among what ``evaluate`` returns, such as ``"accuracy"``; None for minus the loss.
            calibration_samples: how many samples of the training data to watch.
        Raises:
            TaskError: it lacks what is needed.
        """
        from featherweight.train.adopted import score_trainer, train_trainer

        needed = ("model", "args", "train_dataset", "eval_dataset", "get_train_dataloader")
        if missing := [name for name in needed if getattr(trainer, name, None) is None]:
            raise TaskError(f"the {type(trainer).__name__} has no {' and no '.join(missing)}")
        takes = set(inspect.signature(trainer.model.forward).parameters) - {"labels", "label", "label_ids"}
        watched: list[Inputs] = []
        samples = 0
        for batch in trainer.get_train_dataloader():
            if not isinstance(batch, dict) and not hasattr(batch, "keys"):
                raise TaskError(f"the trainer's batches are {type(batch).__name__}, not mappings of inputs")
            inputs = Inputs((), {k: v for k, v in batch.items() if k in takes and isinstance(v, Tensor)})
            watched.append(inputs)
            samples += inputs.batch_size
            if samples >= calibration_samples:
                break
        if not watched:
            raise TaskError("the trainer's training data is empty")

        def train_model(model: nn.Module, epochs: float, loss: Any = None, **settings: Any) -> Any:
            return train_trainer(trainer, model, epochs, loss, **settings)

        return cls(
            example=_first_of(watched[0]),
            calibration=watched,
            evaluate=lambda model: score_trainer(trainer, model, score),
            train=train_model,
        )

    def inputs(self) -> Inputs:
        """The example as the arguments of one call."""
        return as_inputs(self.example)

    def batches(self, model: nn.Module, samples: int | None = None) -> Iterator[Inputs]:
        """The calibration batches on the model's device and in its type; the example where there are none.

        Args:
            model: where to move them.
            samples: stop after the batch in which this many samples were reached; None for all.
        Raises:
            TaskError: a batch is empty.
        """
        example, seen = self.inputs(), 0
        for number, batch in enumerate(self._batches, 1):
            inputs = as_inputs(batch, like=example)
            if inputs.empty:
                raise TaskError(f"calibration batch {number} ({inputs}) is empty: leave such batches out")
            yield inputs.on(model)
            seen += inputs.batch_size
            if samples is not None and seen >= samples:
                return
        if not seen:
            yield example.on(model)

    @property
    def has_calibration(self) -> bool:
        """Whether there is at least one calibration batch."""
        return next(iter(self._batches), None) is not None

    @functools.cached_property
    def _batches(self) -> Iterable[Any]:
        """The calibration as it is read: the same batches each time, as far as their order is concerned."""
        return _in_one_order(self.calibration) if isinstance(self.calibration, DataLoader) else self.calibration

    def problems(self, model: nn.Module) -> list[str]:
        """All that keeps this task from being used with this model, a sentence each; nothing is changed."""
        if not isinstance(model, nn.Module):
            what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
            return [f"the model is {what}, not an nn.Module"]
        problems = [*_bad_values(model), *self._bad_functions()]
        calibration = self._bad_calibration()
        try:
            working = working_copy(model)
        except TaskError as error:
            return [*problems, *calibration, str(error)]
        if problems:
            return [*problems, *calibration]
        with torch.random.fork_rng(devices=()):
            return [*calibration, *self._bad_run(working, calibration=not calibration)]

    def _bad_calibration(self) -> list[str]:
        if isinstance(self.calibration, Iterator):
            return ["calibration is an iterator, which can be read only once: give a list of batches or a DataLoader"]
        if isinstance(self.calibration, Tensor):
            return ["calibration is one tensor: give batches of it, such as calibration=images.split(64)"]
        if not isinstance(self.calibration, Iterable):
            return [f"calibration is a {type(self.calibration).__name__}: give an iterable of batches"]
        try:
            first, again = (list(islice(self._batches, 1)) for _ in range(2))
        except Exception as error:  # whatever a user's data set raises
            return [f"calibration raised {type(error).__name__} at its first batch: {first_line(error)}"]
        if not first and self.calibration != ():
            return ["calibration is empty: give at least one batch, or leave it out to go without data"]
        if first and not _equal(tensors_in(first), tensors_in(again)):
            problem = "calibration gives other batches each time it is read, and answers are compared batch by batch"
            return [f"{problem}: give a loader with shuffle=False and no augmentation, or a list of its batches"]
        return []

    def _bad_functions(self) -> list[str]:
        return [
            f"{name} is a {type(value).__name__}, not a function"
            for name, value in (("evaluate", self.evaluate), ("train", self.train))
            if value is not None and not callable(value)
        ] + (
            [f"loss is {self.loss!r}: use 'cross_entropy', 'mse' or a function (outputs, target) -> scalar"]
            if self.loss not in (None, "cross_entropy", "mse") and not callable(self.loss)
            else []
        )

    def _bad_run(self, model: nn.Module, calibration: bool) -> list[str]:
        """The example and, where asked for, the first calibration batch, each run once."""
        problems = []
        named: list[tuple[str, Any]] = [("example", self.example)]
        if calibration:
            named += [("the first calibration batch", batch) for batch in islice(self._batches, 1)]
        for name, given in named:
            try:
                inputs = as_inputs(given, None if name == "example" else self.inputs()).on(model)
            except TaskError as error:
                problems.append(f"{name}: {error}")
                break
            if inputs.empty:
                problems.append(f"{name} ({inputs}) is empty: give at least one sample")
                break
            if not all(bool(torch.isfinite(t).all()) for t in inputs.tensors() if t.is_floating_point()):
                problems.append(f"{name} ({inputs}) holds NaN or infinite values: clean the data")
                break
            try:
                with torch.no_grad(), mode(model, training=False):
                    answer = tensors_in(inputs.into(model))
            except Exception as error:  # whatever the user's own forward raises
                problems.append(f"{_cannot_run(model, name, inputs, error)}")
                break
            if not answer:
                problems.append(f"the model's answer to {name} holds no tensors")
            elif not all(bool(torch.isfinite(t).all()) for t in answer if t.is_floating_point()):
                problems.append(f"the model's answer to {name} ({inputs}) holds NaN or infinite values")
        return problems

    def fingerprint(self) -> str:
        """A hash of the example, the calibration data, the loss, and the code of `evaluate` and `train`."""
        digest = hashlib.sha256()
        for inputs in (self.inputs(), *(as_inputs(b, like=self.inputs()) for b in self._batches)):
            for tensor in inputs.tensors():
                digest.update(describe(tensor).encode())
                digest.update(raw_bytes(tensor))
        for part in (self.evaluate, self.train, self.loss):
            digest.update(_source(part).encode())
        return digest.hexdigest()


def no_task(given: Any) -> list[str]:
    """A sentence where what was given is no task."""
    kind = type(given).__name__
    return [] if isinstance(given, Task) else [f"the task is a {kind}: give featherweight.Task(example=...)"]


def working_copy(model: nn.Module) -> nn.Module:
    """A copy of the caller's model to run and to change: even a forward may write into buffers.

    Raises:
        TaskError: it cannot be copied.
    """
    try:
        return copied(model)
    except Exception as error:  # whatever a user's module does when it is copied
        raise TaskError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}), and the "
            "caller's model is never changed: make it work with copy.deepcopy"
        ) from error


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's form and values: names, types, shapes and contents of its state."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {describe(tensor)}".encode())
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's values as bytes, whatever its type and wherever it is."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def first_line(error: BaseException) -> str:
    """The first line of an error's own message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def _in_one_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same batches as one that shuffles, in an order drawn now; any other loader as it is.

    The order is drawn with the loader's own generator, which is left as it was, or else with a seed of 0, so that it is
    the same in every run. Only indices are kept. What a data set does to its samples at random stays random.
    """
    batch_sampler = loader.batch_sampler
    sampler = getattr(batch_sampler, "sampler", None)
    if type(batch_sampler) is BatchSampler and isinstance(sampler, SequentialSampler):
        return loader
    # Without a batch sampler, or in a loader of a kind of its own, nothing says how the batches come about.
    if batch_sampler is None or isinstance(loader.dataset, IterableDataset) or type(loader) is not DataLoader:
        return loader
    generators = [g for g in (getattr(s, "generator", None) for s in (batch_sampler, sampler)) if g is not None]
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        order = list(batch_sampler)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return DataLoader(
        loader.dataset,
        batch_sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # of the workers' seeds, so that reading uses up no other random numbers
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether the same tensors, NaN for NaN."""
    return len(one) == len(other) and all(
        describe(a) == describe(b) and raw_bytes(a) == raw_bytes(b) for a, b in zip(one, other, strict=True)
    )


def _source(value: Any) -> str:
    """What a function does, as far as its own code says so: operations, names, constants, and what it was bound to."""
    match value:
        case functools.partial():
            return f"{_source(value.func)} {_source(value.args)} {_source(sorted(value.keywords.items()))}"
        case types.MethodType():
            return _source(value.__func__)
        case types.FunctionType():
            held = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
            held = [getattr(item, "__code__", item) for item in held]  # a function may hold itself
            return f"{_source(value.__code__)} {_source(value.__defaults__)} {_source(held)}"
        case types.CodeType():
            return f"{value.co_code.hex()} {value.co_names} {_source(value.co_consts)}"
        case tuple() | list():
            return f"[{', '.join(_source(item) for item in value)}]"
        case frozenset():
            return _source(sorted(value, key=repr))
        case Tensor():
            return f"{describe(value)} {hashlib.sha256(raw_bytes(value)).hexdigest()}"
        case str() | int() | float() | bytes() | None:
            return repr(value)
    # Of anything else only its kind: a representation may hold an address, which differs from run to run.
    call = vars(type(value)).get("__call__")
    return f"{type(value).__qualname__} {_source(call) if isinstance(call, types.FunctionType) else ''}"


def _settings_of_fit(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, all of which `fit` has.

    Raises:
        TaskError: it does not.
    """
    from featherweight.train.fit import fit

    known = set(inspect.signature(fit).parameters) - {"model", "loader", "epochs", "loss"}
    if unknown := [f"{name!r}{did_you_mean(name, known)}" for name in settings if name not in known]:
        raise TaskError(f"fit has no setting {', '.join(unknown)}")
    return settings


def _nothing(*_: Any) -> None:
    """What a data module does that has nothing to prepare."""


def _loader_of(datamodule: Any, *names: str) -> Iterable[Any]:
    """The first loader that the data module has of these.

    Raises:
        TaskError: it has none.
    """
    for name in names:
        made = getattr(datamodule, f"{name}_dataloader", _nothing)()
        if isinstance(made, list | tuple) and len(made) == 1 and isinstance(made[0], DataLoader):
            made = made[0]
        if made is not None:
            return cast(Iterable[Any], made)
    wanted = " or ".join(f"{name}_dataloader" for name in names)
    raise TaskError(f"{type(datamodule).__name__} gives no loader by {wanted}")


def _watched(loader: Iterable[Any], inputs: int, samples: int) -> list[Inputs]:
    """The inputs of a loader's first batches, so many of each batch.

    Raises:
        TaskError: it yields none.
    """
    found: list[Inputs] = []
    seen = 0
    for batch in loader:
        given = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        found.append(Inputs(given[:inputs]))
        seen += found[-1].batch_size
        if seen >= samples:
            break
    if not found:
        raise TaskError("the loader yields no batches: give it at least one")
    return found


def _first_of(inputs: Inputs) -> Inputs:
    """The first sample."""
    return Inputs(tuple(_first(a) for a in inputs.args), {k: _first(v) for k, v in inputs.kwargs.items()})


def _first(value: Any) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.ndim else value


def _bad_values(model: nn.Module) -> list[str]:
    if lazy := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]:
        return [f"{first_few(lazy)} have no shape yet: call the model once on an example"]
    if empty := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        return [f"{first_few(empty)} are on the meta device, without values: load the model's weights"]
    parameters = [n for n, t in model.named_parameters() if not bool(torch.isfinite(_readable(t)).all())]
    norms = [name for name, module in model.named_modules() if isinstance(module, _NormBase)]
    finite = {f"{name}.{leaf}".removeprefix(".") for name in norms for leaf in ("running_mean", "running_var")}

    def bad_buffer(name: str, tensor: Tensor) -> bool:
        # Other buffers may hold infinities on purpose, such as attention masks.
        good = ~torch.isnan(tensor) if name not in finite else torch.isfinite(tensor)
        return not bool(good.all())

    bad = parameters + [n for n, t in model.named_buffers() if bad_buffer(n, _readable(t))]
    if not bad:
        return []
    return [f"NaN or infinite values in {first_few(bad)}: the model is damaged; load or train it again"]


def _readable(tensor: Tensor) -> Tensor:
    """The tensor in a type that can be asked for NaN: 8-bit floats cannot."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _cannot_run(model: nn.Module, name: str, inputs: Inputs, error: Exception) -> str:
    kind = str(dtype_of(model)).removeprefix("torch.")
    return (
        f"{type(model).__name__} ({kind}) cannot run on {name} ({inputs}): {type(error).__name__}: "
        f"{first_line(error)}; give inputs of the shape and type that model(...) takes"
    )
