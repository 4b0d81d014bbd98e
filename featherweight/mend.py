"""Values put right after a change of form: batch-norm statistics, biases, and by training all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.batch import Inputs, mode
from featherweight.curvature.gram import Statistics
from featherweight.errors import TaskError, first_few
from featherweight.progress import track
from featherweight.task import Task

# Fewer samples than this say too little of a batch norm's mean and variance.
MENDING_SAMPLES = 32


def fold_batch_norms(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Take batch norms' running statistics into their weights and biases, in place.

    ``(x − μ) / √(σ² + ε) · γ + β`` becomes ``x · γ' + β'`` with statistics that change nothing (mean 0, variance
    1 − ε), which files hold in a few bytes. In evaluation mode answers stay the same up to rounding of the last
    digits; in training mode, where statistics are the batch's, they do not: fold after training.

    Args:
        model: the network. Batch norms without weights or statistics, and such whose tensors are confined, stay.
    Returns:
        Of every one folded the mean and the standard deviation of its inputs, μ and σ, each (channels,) in float64.
    """
    folded = {}
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or not norm.affine or norm.running_var is None or norm.running_mean is None:
            continue
        if hasattr(norm, "parametrizations"):
            continue
        with torch.no_grad():
            folded[name] = norm.running_mean.double(), norm.running_var.double().sqrt()
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            norm.bias.copy_(norm.bias.double() - norm.running_mean.double() * factor)
            norm.weight.copy_(factor)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
    return folded


def reestimate_batch_norm(
    model: nn.Module,
    batches: Callable[[], Iterable[Inputs]],
    distance: Callable[[nn.Module], float],
    names: Collection[str],
    before: float | None = None,
) -> bool:
    """Give batch norms the mean and variance of what reaches them now, in place; kept only where answers come nearer.

    Compression moves the statistics of activations, and a network normalised by the old ones can lose all its accuracy
    (Nagel et al., Data-free quantization through weight equalization and bias correction, 2019, section 4.2, describes
    the same shift for quantization).

    Args:
        model: the network; its batch norms' running statistics change.
        batches: calibration batches, read once.
        distance: how far a model's answers are from what they should be.
        names: which batch norms; others keep what training gave them.
        before: the distance as the model is, where it is known already.
    Returns:
        Whether new statistics were kept.
    """
    norms = [m for n, m in model.named_modules() if n in names and isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return False
    before = distance(model) if before is None else before
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    nearer = False
    try:
        _average(model, norms, batches())
        nearer = distance(model) < before
    finally:
        for norm, momentum, old in zip(norms, momenta, kept, strict=True):
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                if not nearer or name == "num_batches_tracked":
                    buffer.copy_(old[name])
    return nearer


def _average(model: nn.Module, norms: Collection[_BatchNorm], batches: Iterable[Inputs]) -> None:
    """Give batch norms the means over samples of every batch's own statistics, in place."""
    samples = 0
    with torch.no_grad(), mode(model, training=False):
        for norm in norms:
            norm.training = True
        for inputs in track(batches, "re-estimating batch-norm statistics"):
            for norm in norms:
                norm.momentum = inputs.batch_size / (samples + inputs.batch_size)
            try:
                inputs.into(model)
            except ValueError:  # one value a channel, as in a last batch of one sample, has no variance
                continue
            samples += inputs.batch_size


def corrected_bias(weight: Tensor, bias: Tensor, replaced: Tensor, statistics: Statistics) -> Tensor:
    """The bias that keeps the mean of a layer's outputs what it was: ``E[W x + b] − Ŵ E[x̂]``.

    Nagel et al., 2019, section 4.2, in the form that data gives.

    Args:
        weight: W, the layer's weight, (outputs, inputs / groups, *kernel).
        bias: b, (outputs,).
        replaced: Ŵ, the weight that takes its place, of the same shape.
        statistics: of the layer's inputs: x of the original, x̂ of the network as it is now.
    """
    groups, width = statistics.mean.shape
    now = (replaced.double().reshape(groups, -1, width) @ statistics.mean.double()[..., None]).flatten()
    if statistics.answer_mean is not None:
        then = statistics.answer_mean.double().flatten()
    else:
        then = bias + (weight.double().reshape(groups, -1, width) @ statistics.mean.double()[..., None]).flatten()
    return (then - now).to(bias.dtype)


def finetune(
    model: nn.Module,
    task: Task,
    epochs: float,
    loss: Callable[[Any, Any], Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Train the model in place with the task's own function.

    Args:
        model: the network.
        task: whose ``train`` does it.
        epochs: how long.
        loss: instead of the task's own.
        options: what ``train`` is given besides.
    Returns:
        What ``train`` returned.
    Raises:
        TaskError: train raised, or left values that are not finite.
    """
    assert task.train is not None
    given = {**({} if loss is None else {"loss": loss}), **(options or {})}
    try:
        done = task.train(model, epochs, **given)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"train(model, {epochs}) raised {type(error).__name__}: {error}") from error
    if bad := [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise TaskError(
            f"train(model, {epochs}) left NaN or infinite weights, in {first_few(bad)}: lower its learning rate"
        )
    return done
