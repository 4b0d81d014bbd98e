"""What the data says of every layer, gathered in one pass: Gram matrices of its inputs, covariances of its gradients.

Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015,
arxiv.org/abs/1503.05671; Grosse & Martens, A Kronecker-factored approximate Fisher matrix for convolution layers,
2016, arxiv.org/abs/1602.01407. There positions' gradients are taken to be uncorrelated; where pooling or attention
follows they add up, and a change of the weight matters many times more: how many is measured.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.batch import Inputs, device_of, mode, tensors_in
from featherweight.curvature.products import Rows, apart, products
from featherweight.errors import TaskError
from featherweight.forms import Layer, attention_of
from featherweight.progress import track

# What each of the statistics is a mean over.
_WEIGHTS = {
    "gram": "rows",
    "mean": "rows",
    "cross": "rows",
    "answer_mean": "rows",
    "gradients": "gradient_rows",
    "positions": "samples",
    "together": "probed",
    "apart": "probed",
}


# Of the softmax whose curvature weighs a classifier's layers. By measured divergence of compressed networks 2 is better
# than 1 wherever a network is sure of its answers, and no worse elsewhere.
TEMPERATURE = 2.0


# Of the samples of a batch, so many are looked at for how the errors of their positions add up.
PROBED = 0.25

# Rows that a least-squares fit looks at, as a multiple of the input's width: with n times as many samples as unknowns
# the fit's error is 1 + 1/n times the least.
ROWS_A_COLUMN = 32
# Where inputs are gone and the fit has to make up for them, more: neighbouring positions say much the same, so that
# n is far less than this.
ROWS_A_KEPT_COLUMN = 128
# Numbers that the inputs of one layer may take up where they are held and not summed up: a quarter of a gigabyte.
ROWS_NUMBERS = 1 << 26


@dataclass
class Statistics:
    """Second moments of what goes into one layer and, when asked for, of the loss's gradient at what comes out.

    Attributes:
        gram: G = E[x xᵀ] over samples and output positions, x the layer's input (of a convolution the patch under the
            kernel, channels before kernel axes), per group: (groups, d, d), float32.
        mean: E[x]: (groups, d), float32.
        gradients: A = E[g gᵀ], g the gradient of one sample's loss at one output position: (outputs, outputs), or None.
        cross: E[a xᵀ], where x comes out of a network that was changed before this layer and a is what the layer
            answers in the original, its bias included: (groups, outputs / groups, d); None where nothing was changed.
        answer_mean: E[a]: (groups, outputs / groups); None where nothing was changed.
        rows: how many x were seen.
        positions: output positions a sample, over all calls: tokens, pixels; 1 for a plain Linear that is called once.
            With gradients, times how errors at them add up, so that ``½ tr(A ΔW G ΔWᵀ) · positions`` is what a change
            of the weight does to the loss: 1 where they are uncorrelated, as many as there are where all are alike.
        gradient_rows: how many g were seen.
        samples: how many samples went through the network.
        together: the mean over probed samples of ‖Σ g xᵀ‖², the sum over a sample's positions.
        apart: the same of Σ ‖g xᵀ‖².
        probed: how many samples these are of.
    """

    gram: Tensor
    mean: Tensor
    gradients: Tensor | None = None
    cross: Tensor | None = None
    answer_mean: Tensor | None = None
    rows: int = 0
    positions: float = 1.0
    gradient_rows: int = 0
    samples: int = 0
    together: float = 0.0
    apart: float = 0.0
    probed: int = 0

    def centred(self) -> Statistics:
        """The same of x − E[x] and a − E[a]: what is left to fit once a bias takes care of the means."""
        mean = self.mean.to(self.gram.device)
        gram = self.gram - mean[..., :, None] * mean[..., None, :]
        cross = None
        if self.cross is not None and self.answer_mean is not None:
            cross = self.cross - self.answer_mean[..., :, None] * mean[..., None, :]
        return replace(self, gram=gram, cross=cross)


def gather(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Inputs],
    *,
    gradients: Callable[[Any, torch.Generator], Tensor] | None = None,
    effort: float = 0.5,
    memory_limit: int = 4 << 30,
    seed: int = 0,
) -> dict[str, Statistics]:
    """The statistics of the layers' inputs over the batches, in one pass.

    Of convolutions, and of Linear layers over tokens, a random subset of positions is looked at, as large as keeps the
    products within `effort` times the cost of the layers themselves. Rows of an attention's projection that have inputs
    of their own are groups, as of a convolution. In a process group every process takes its share of the batches, and
    all get the sum.

    Args:
        model: the network; run in evaluation mode, without touching its parameters.
        layers: which layers to watch, by name; they must be the model's own.
        batches: inputs, on the model's device.
        gradients: a function (outputs, generator) → scalar whose gradient is to be watched; None for inputs only.
        effort: multiply-accumulates spent on Gram matrices, as a multiple of the layers' own.
        memory_limit: bytes of Gram matrices kept in memory; what is above lies in a temporary file.
        seed: of the choice of positions and of what `gradients` draws.
    Returns:
        Statistics by name, of the layers that were called, and of attention's projections if no row of them was
        multiplied by in two ways.
    Raises:
        TaskError: a layer's input or the gradient at its output holds NaN or infinite values.
    """
    generator = torch.Generator().manual_seed(seed)
    store = _Store(memory_limit)
    found: dict[str, Statistics] = {}
    places: Counter[str] = Counter()
    samples = size = 0
    probes: list[tuple[str, Tensor]] = []
    kept: dict[str, list[Tensor]] = {}
    known = dict(layers)  # and the rows that attention multiplies by at once, each as a layer

    def reached(name: str, layer: Layer, x: Tensor, output: Tensor) -> Tensor | None:
        views = patches(layer, x.detach())
        rows = _take(layer, views, _pick(layer, views, effort, generator))
        if name not in found:
            groups, _, width = rows.shape
            found[name] = Statistics(store.zeros((groups, width, width), x.device), x.new_zeros(groups, width).float())
        _add_rows(found[name], rows)
        places[name] += int(_places(layer, views).numel())
        if gradients is None:
            return None
        # Adding a zero whose gradient is asked for leaves answers as they are and needs no parameter's gradient.
        probe = torch.zeros_like(output, requires_grad=True)
        probes.append((name, probe))
        kept.setdefault(name, []).append(_first(layer, x.detach(), size).clone())
        return output + probe

    def watch(name: str, layer: Layer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return reached(name, layer, args[0] if args else kwargs["input"], output)

        return hook

    def projected(name: str, rows: Rows, x: Tensor, output: Tensor) -> Tensor | None:
        part = f"{name}[{rows[0]}:{rows[1]}]"
        known.setdefault(part, nn.Linear(x.shape[-1], output.shape[-1], device="meta"))
        return reached(part, known[part], x, output)

    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        for name, layer in layers.items():
            handle = layer.register_forward_hook(watch(name, layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(products(model, layers, projected))
        for inputs in my_share(track(batches, "watching what the data does")):
            probes.clear()
            kept.clear()
            size = inputs.batch_size
            samples += size
            with torch.set_grad_enabled(gradients is not None):
                outputs = inputs.into(model)
                if gradients is not None and probes:
                    loss = gradients(outputs, generator)
                    grads = torch.autograd.grad(loss, [p for _, p in probes], allow_unused=True)
                    by_name: dict[str, list[Tensor | None]] = {}
                    for (name, _), grad in zip(probes, grads, strict=True):
                        by_name.setdefault(name, []).append(grad)
                        if grad is not None:
                            _add_gradients(found[name], known[name], grad)
                    for name, of_calls in by_name.items():
                        calls = [
                            (x, _first(known[name], g, size))
                            for x, g in zip(kept[name], of_calls, strict=True)
                            if g is not None
                        ]
                        _add_coherence(found[name], known[name], calls, size)
    for name, statistics in found.items():
        statistics.positions, statistics.samples = places[name] / max(1, samples), samples
    found = _over_processes(found, samples, device_of(model))
    for name, statistics in found.items():
        if not bool(torch.isfinite(statistics.gram).all()):
            raise TaskError(f"what goes into {name!r} holds NaN or infinite values: look at the calibration data")
        if statistics.gradients is not None and not bool(torch.isfinite(statistics.gradients).all()):
            raise TaskError(
                f"the loss's gradient at {name!r} holds NaN or infinite values: look at the model's answers"
            )
        if statistics.apart:
            statistics.positions *= statistics.together / statistics.apart
    return _joined(found, [name for name in layers if attention_of(model, name) is not None])


def _joined(found: dict[str, Statistics], names: Iterable[str]) -> dict[str, Statistics]:
    """The statistics with those of some rows of a projection put together; without such as cannot be."""
    joined = dict(found)
    for name in names:
        parts: dict[Rows, Statistics] = {}
        for key in [key for key in joined if key.startswith(f"{name}[")]:
            first, end = key.removeprefix(f"{name}[").removesuffix("]").split(":")
            parts[int(first), int(end)] = joined.pop(key)
        if parts and apart(parts):
            joined[name] = _side_by_side(dict(sorted(parts.items())))
    return joined


def _side_by_side(parts: Mapping[Rows, Statistics]) -> Statistics:
    """The statistics of a weight whose rows have different inputs, as of a layer in groups of as many rows."""
    (one, *others), lengths = list(parts.values()), [end - first for first, end in parts]
    if not others:
        return one
    each = math.gcd(*lengths)
    times = [length // each for length in lengths]

    def stacked(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.expand(n, *t.shape[1:]) for t, n in zip(tensors, times, strict=True)])

    gradients = None
    if any(s.gradients is not None for s in parts.values()):
        # There is one number of positions for all: what makes it more or less is put into the gradients.
        gradients = torch.block_diag(  # type: ignore[no-untyped-call]
            *(
                one.gram.new_zeros(length, length) if s.gradients is None else s.gradients * s.positions / one.positions
                for s, length in zip(parts.values(), lengths, strict=True)
            )
        )
    return replace(
        one,
        gram=stacked([s.gram for s in parts.values()]),
        mean=stacked([s.mean for s in parts.values()]),
        gradients=gradients,
        rows=min(s.rows for s in parts.values()),
    )


def gather_paired(
    layer: Layer,
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    samples: int,
    effort: float = 8.0,
    rows_a_column: int = ROWS_A_COLUMN,
    positions: int | None = None,
    seed: int = 0,
) -> Statistics | None:
    """The statistics of one layer's inputs in a network whose earlier layers were changed, with the original's answers.

    Args:
        layer: the original's.
        pairs: call by call, what goes into the layer in the changed network, and what it answers in the original, as
            `Lockstep.at` gives them.
        samples: how many samples all pairs together are of.
        effort: as in `gather`; more than there, since only one layer is watched, of all that are run for it. Of what
            that allows, no more is taken than a fit can use.
        rows_a_column: how much that is, as a multiple of the width of an input.
        positions: instead of that, how many random positions of every sample; None for as many as that allows.
        seed: of the choice of positions.
    Returns:
        None where there are no pairs.
    Raises:
        TaskError: the two networks do not call the layer with as many rows.
    """
    total: Statistics | None = None
    places = 0
    generator = torch.Generator().manual_seed(seed)
    for x, answer in pairs:
        now, then = (tuple(t.shape[: -_kernel_axes(layer)]) for t in (x, answer))
        if now != then:
            raise TaskError(
                f"{layer} gets inputs of {now} rows in the compressed network and of {then} in the original, so their "
                "number depends on values, and they cannot be compared: leave the layer out with ignore"
            )
        views = patches(layer, x)
        if positions is None:
            chosen = _pick(layer, views, effort, generator, most=rows_a_column * len(x) / samples)
        else:
            chosen = _pick_each(layer, views, positions, generator)
        rows = _take(layer, views, chosen)
        places += int(_places(layer, views).numel())
        answers = _channels_last(layer, answer)
        answers = (answers if chosen is None else answers[chosen]).float()
        answers = answers.reshape(len(answers), len(rows), -1).transpose(0, 1)  # (groups, rows, outputs / groups)
        if total is None:
            groups, _, width = rows.shape
            gram, mean = rows.new_zeros(groups, width, width), rows.new_zeros(groups, width)
            cross, answer_mean = (
                rows.new_zeros(groups, answers.shape[2], width),
                rows.new_zeros(groups, answers.shape[2]),
            )
            total = Statistics(gram, mean, cross=cross, answer_mean=answer_mean)
        _add_rows(total, rows, answers)
    if total is not None:
        total.positions, total.samples = places / max(1, samples), samples
    return _over_processes({} if total is None else {"": total}, samples, layer.weight.device).get("")


def paired_rows(
    layer: Layer,
    pairs: Iterable[tuple[Tensor, Sequence[Tensor]]],
    *,
    samples: int,
    numbers: int = ROWS_NUMBERS,
    positions: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]] | None:
    """What goes into a layer, position by position, and other tensors at the same positions of its answer.

    Args:
        layer: without groups.
        pairs: call by call, what goes in, and tensors of the shape of the answer but for the number of channels.
        samples: how many samples all pairs together are of.
        numbers: how many numbers of inputs to hold at most.
        positions: instead of that, how many random positions of every sample; None for as many as a fit can use.
        seed: of the choice of positions.
    Returns:
        The inputs (rows, d), and the other tensors (rows, channels), float32; None where there are no pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    beside: list[list[Tensor]] = []
    for x, others in pairs:
        views = patches(layer, x)
        width = int(views.shape[1 + len(_places(layer, views)) :].numel())
        if positions is None:
            most = min(ROWS_A_KEPT_COLUMN, numbers / width**2) * len(x) / samples
            chosen = _pick(layer, views, math.inf, generator, most=most)
        else:
            chosen = _pick_each(layer, views, positions, generator)
        rows.append(_take(layer, views, chosen)[0])
        flat = [_channels_last(layer, other) for other in others]
        beside.append([(one if chosen is None else one[chosen]).float() for one in flat])
    if not rows:
        return None
    return torch.cat(rows), [torch.cat(parts) for parts in zip(*beside, strict=True)]


def patches(layer: Layer, x: Tensor) -> Tensor:
    """A layer's inputs position by position, as a view: (groups, samples, *positions, inputs / groups, *kernel).

    Args:
        layer: a Linear, whose kernel has no axes, or a convolution.
        x: what goes in; a convolution's padding is added here.
    """
    if isinstance(layer, nn.Linear):
        return x[None]
    dims = len(layer.kernel_size)
    if x.ndim == dims + 1:  # a sample without a batch dimension
        x = x[None]
    sides: list[int] = layer._reversed_padding_repeated_twice
    if any(sides):
        x = F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.reshape(x.shape[0], layer.groups, -1, *x.shape[2:])  # (samples, groups, channels, *positions, *kernel)
    return x.permute(1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))


def classifier_loss(class_dim: int) -> Callable[[Any, torch.Generator], Tensor]:
    """A scalar whose gradients' covariance is the Fisher matrix of the model's own predictive distribution.

    The curvature of cross-entropy at the logits is H = diag(p) − p pᵀ = S Sᵀ with S = (I − p 1ᵀ) diag(√p). The gradient
    at the logits is made S v, v random signs, so that its covariance is H (Martens, Sutskever & Swersky, Estimating the
    Hessian by back-propagating curvature, 2012, arxiv.org/abs/1206.6464). Labels drawn from p have the same covariance
    in expectation, but where the model is sure nearly all of them say nothing. For the same reason p is softened as in
    distillation (Hinton, Vinyals & Dean, 2015, arxiv.org/abs/1503.02531): compression moves answers farther than the
    curvature at a sure answer can see.

    Args:
        class_dim: the dimension of the outputs' first tensor that holds the classes.
    """

    def loss(outputs: Any, generator: torch.Generator) -> Tensor:
        logits = getattr(outputs, "logits", None)
        logits = (tensors_in(outputs)[0] if logits is None else logits).movedim(class_dim, -1).float()
        p = (logits.detach() / TEMPERATURE).softmax(-1)
        signs = torch.randint(2, p.shape, generator=generator).to(p) * 2 - 1
        spread = p.sqrt() * signs
        return (logits * (spread - p * spread.sum(-1, keepdim=True))).sum()

    return loss


def regression_loss(outputs: Any, generator: torch.Generator) -> Tensor:
    """Half the relative squared error against the model's own answer with Gaussian noise drawn on it."""
    total = torch.zeros(())
    for tensor in tensors_in(outputs):
        if tensor.is_floating_point() and tensor.requires_grad:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            size = tensor.detach().float().square().sum() / max(1, tensor.shape[0] if tensor.ndim else 1)
            total = total.to(tensor.device) + (tensor * noise).float().sum() / size.clamp_min(1e-30).sqrt()
    return total


def _pick(
    layer: Layer, views: Tensor, effort: float, generator: torch.Generator, most: float = math.inf
) -> Tensor | None:
    """Which positions of `patches` to look at: as many random ones as cost `effort` times the layer; None for all.

    No more than `most` times the width of an input.
    """
    places = _places(layer, views)
    width = int(views.shape[1 + len(places) :].numel())
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels // layer.groups
    everything = int(places.numel())
    wanted = max(places[0] if places else 1, round(min(effort * everything * outputs / width, most * width)))
    if wanted >= everything:
        return None
    return torch.randint(everything, (wanted,), generator=generator).to(views.device)


def _pick_each(layer: Layer, views: Tensor, count: int, generator: torch.Generator) -> Tensor | None:
    """So many random positions of every sample of `patches`, none of them twice; None for all."""
    samples, each = views.shape[1], int(_places(layer, views)[1:].numel())
    if count >= each:
        return None
    chosen = torch.rand(samples, each, generator=generator).argsort(1)[:, :count]
    return (chosen + torch.arange(samples)[:, None] * each).flatten().to(views.device)


def _places(layer: Layer, views: Tensor) -> torch.Size:
    """Samples and positions of `patches`: (samples, *positions)."""
    return views.shape[1 : views.ndim - _kernel_axes(layer)]


def _take(layer: Layer, views: Tensor, chosen: Tensor | None) -> Tensor:
    """The chosen positions of `patches` as vectors: (groups, rows, d), float32."""
    first = 1 + len(_places(layer, views))  # the first dimension of a vector
    if chosen is None:
        return views.reshape(views.shape[0], -1, int(views.shape[first:].numel())).float()
    # Indexing a view of so many dimensions is slow: reading the memory behind it is four times as fast.
    group, place, element = (_offsets(views, *span) for span in ((0, 1), (1, first), (first, views.ndim)))
    wanted = group[:, None, None] + place[chosen][:, None] + element
    memory = views.as_strided((1 + int(group[-1] + place[-1] + element[-1]),), (1,))
    return memory.index_select(0, wanted.flatten()).reshape(wanted.shape).float()


def _offsets(view: Tensor, start: int, stop: int) -> Tensor:
    """How far into memory the elements along some dimensions of a view lie, the last dimension running fastest."""
    offsets = torch.zeros(1, dtype=torch.long, device=view.device)
    for size, stride in zip(view.shape[start:stop], view.stride()[start:stop], strict=True):
        offsets = (offsets[:, None] + torch.arange(size, device=view.device) * stride).flatten()
    return offsets


def _kernel_axes(layer: Layer) -> int:
    """How many trailing dimensions of `patches` make up one input vector: channels and the kernel's axes."""
    return 1 if isinstance(layer, nn.Linear) else 1 + len(layer.kernel_size)


def _add_rows(statistics: Statistics, rows: Tensor, answers: Tensor | None = None) -> None:
    """Move the running means by these rows: a mean, unlike a sum, does not outgrow float32."""
    count = rows.shape[1]
    if not count:
        return
    statistics.rows += count
    share = count / statistics.rows
    rows = rows.to(statistics.gram.device)
    # In place and in one call: a wide layer's matrix is large, and going through it takes longer than the products.
    statistics.gram.baddbmm_(rows.transpose(1, 2), rows, beta=1 - share, alpha=share / count)
    statistics.mean += share * (rows.mean(1).to(statistics.mean.device) - statistics.mean)
    if answers is not None and statistics.cross is not None and statistics.answer_mean is not None:
        statistics.cross.baddbmm_(answers.transpose(1, 2), rows, beta=1 - share, alpha=share / count)
        statistics.answer_mean += share * (answers.mean(1) - statistics.answer_mean)


def _add_gradients(statistics: Statistics, layer: Layer, grad: Tensor) -> None:
    rows = _channels_last(layer, grad).float()
    if statistics.gradients is None:
        statistics.gradients = rows.new_zeros(rows.shape[1], rows.shape[1])
    statistics.gradient_rows += len(rows)
    share = len(rows) / statistics.gradient_rows
    statistics.gradients += share * (rows.T @ rows / len(rows) - statistics.gradients)


def _first(layer: Layer, tensor: Tensor, samples: int) -> Tensor:
    """What is looked at of a batch of so many samples, which lie along the first dimension, some in several parts."""
    if tensor.ndim <= _kernel_axes(layer):  # a sample without a batch dimension
        tensor = tensor[None]
    parts = max(1, len(tensor) // max(1, samples))
    return tensor[: parts * max(1, int(PROBED * samples))]


def _add_coherence(statistics: Statistics, layer: Layer, calls: Sequence[tuple[Tensor, Tensor]], batch: int) -> None:
    """Compare the gradient of the weight, sample by sample, with what it would be of positions that have no relation.

    Args:
        statistics: to add to.
        layer: whose.
        calls: what went in and the gradient at what came out, of the first samples of a batch.
        batch: how many samples the whole batch has.
    """
    probed = max(1, int(PROBED * batch))
    if not calls or any(len(x) % probed or not x.numel() for x, _ in calls):
        return  # there are fewer than samples: they do not lie along the first dimension
    together = apart = 0.0
    for sample in range(probed):
        parts = [(_part(x, sample, probed), _part(g, sample, probed)) for x, g in calls]
        if isinstance(layer, nn.Linear):
            x, g = (torch.cat([pair[i].reshape(-1, pair[i].shape[-1]) for pair in parts]).float() for i in (0, 1))
            if len(x) * (x.shape[1] + g.shape[1]) < x.shape[1] * g.shape[1]:
                together += float(((x @ x.T) * (g @ g.T)).sum())
            else:
                together += float((g.T @ x).square().sum())
            apart += float(x.square().sum(1) @ g.square().sum(1))
        else:
            both = [_convolved(layer, x.float(), g.float()) for x, g in parts]
            together += float(torch.stack([gradient for gradient, _ in both]).sum(0).square().sum())
            apart += sum(float(alone) for _, alone in both)
    statistics.probed += probed
    share = probed / statistics.probed
    statistics.together += share * (together / probed - statistics.together)
    statistics.apart += share * (apart / probed - statistics.apart)


def _part(tensor: Tensor, index: int, parts: int) -> Tensor:
    size = len(tensor) // parts
    return tensor[index * size : (index + 1) * size]


def _convolved(layer: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a convolution's weight, Σ g xᵀ over positions, and Σ ‖g‖² ‖x‖², over groups too."""
    sides: list[int] = layer._reversed_padding_repeated_twice
    if any(sides):
        x = F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    dims = len(layer.kernel_size)
    how = (layer.stride, [0] * dims, layer.dilation, False, [0] * dims, layer.groups)
    gradient = torch.ops.aten.convolution_backward(
        grad, x, layer.weight.detach().float(), None, *how, [False, True, False]
    )[1]
    ones = x.new_ones(layer.groups, layer.in_channels // layer.groups, *layer.kernel_size)
    sizes = torch.ops.aten.convolution(x.square(), ones, None, *how)
    return gradient, (grad.square().reshape(len(grad), layer.groups, -1, *grad.shape[2:]).sum(2) * sizes).sum()


def _channels_last(layer: Layer, output: Tensor) -> Tensor:
    """A layer's outputs position by position: (samples · positions, outputs)."""
    last = output if isinstance(layer, nn.Linear) else output.movedim(-1 - len(layer.kernel_size), -1)
    return last.reshape(-1, last.shape[-1])


def my_share(batches: Iterable[Inputs]) -> Iterable[Inputs]:
    """Every process of a group takes every so-many-th batch; one process takes all."""
    world = torch.distributed
    if not (world.is_available() and world.is_initialized()):
        return batches
    rank, size = world.get_rank(), world.get_world_size()
    return (batch for index, batch in enumerate(batches) if index % size == rank)


def _over_processes(found: dict[str, Statistics], samples: int, device: torch.device) -> dict[str, Statistics]:
    """The statistics of all processes of a group, the same for every one: means weighted by what is behind them."""
    world = torch.distributed
    if not (world.is_available() and world.is_initialized()):
        return found
    # All must agree on what is summed: a process none of whose batches reached a layer takes part with zeros.
    mine = {(name, field): _shape(getattr(s, field)) for name, s in found.items() for field in _WEIGHTS}
    theirs: list[dict[tuple[str, str], torch.Size | None]] = [{}] * world.get_world_size()
    world.all_gather_object(theirs, mine)
    shapes = {key: shape for known in theirs for key, shape in known.items() if shape is not None}
    nothing = Statistics(torch.empty(0), torch.empty(0), positions=0.0, samples=samples)
    merged = {name: found.get(name, replace(nothing)) for name, _ in shapes}
    for (name, field), shape in shapes.items():
        statistics, here = merged[name], getattr(merged[name], field)
        weight = torch.tensor(float(getattr(statistics, _WEIGHTS[field])), device=device)
        value = torch.as_tensor(here, device=device) if weight else torch.zeros(shape, device=device)
        world.all_reduce(value.mul_(weight))
        world.all_reduce(weight)
        setattr(statistics, field, value.div_(weight.clamp_min(1)))
    for statistics in merged.values():
        statistics.positions = float(statistics.positions)
        statistics.together, statistics.apart = float(statistics.together), float(statistics.apart)
        for field in ("rows", "gradient_rows", "samples", "probed"):
            count = torch.tensor(getattr(statistics, field), device=device)
            world.all_reduce(count)
            setattr(statistics, field, int(count))
    return merged


def _shape(value: Tensor | float | None) -> torch.Size | None:
    return None if value is None else torch.as_tensor(value).shape


class _Store:
    """Allocates matrices in memory up to a limit, and above it in a temporary file that goes with the process."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def zeros(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """A float32 tensor of zeros."""
        size = int(torch.Size(shape).numel())
        self.left -= 4 * size
        if self.left >= 0 or not size:
            return torch.zeros(shape, device=device)
        handle, path = tempfile.mkstemp(prefix="featherweight-gram-")
        try:
            os.truncate(handle, 4 * size)  # a file of zeros that takes no space until written
            return torch.from_file(path, shared=True, size=size, dtype=torch.float32).reshape(shape)
        finally:
            os.close(handle)
            os.unlink(path)  # the mapping keeps it alive
