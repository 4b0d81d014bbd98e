"""Block reconstruction: the rounding of all weights of a block is learnt together, for the block's output.

Li et al., BRECQ: Pushing the limit of post-training quantization by block reconstruction, 2021,
arxiv.org/abs/2102.05426; its authors' program weighs all outputs alike, as this does. What goes into a block is what
the compressed network gives it, or that and what the original does, mixed value by value (Wei et al., QDrop, 2022,
arxiv.org/abs/2203.05740), which keeps the fit from clinging to very few samples. What a value is rounded to is a
sigmoid between its two neighbours that grows steeper (Gong et al., Differentiable soft quantization, 2019,
arxiv.org/abs/1908.05033): it is decided within a few hundred steps, where the paper's penalty takes thousands. Scales
are learnt beside it (Jeon et al., GENIE, 2023, arxiv.org/abs/2212.04780). At last biases, or the means of batch norms
behind, are moved so that the layers' outputs have the original's means.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.batch import Inputs, mode
from featherweight.constant import norms_behind
from featherweight.forms import Gridded, beneath, constraints_on, is_layer, layer_at, place, released
from featherweight.forms.grid import short
from featherweight.forms.mask import Masked
from featherweight.layerwise import Jointly
from featherweight.quantize.gptq import GPTQ
from featherweight.search.options import Plan
from featherweight.study import Study
from featherweight.task import Task

# More layers than this are no block: what is between them can be seen by itself.
MOST_LAYERS = 12
RATE = 0.1  # of Adam, whose steps are of about that size in every variable
RATE_OF_SCALES = 1e-3  # the same for the logarithms of what scales are multiplied by
STEEPEST = 0.02  # the temperature at the end, from 1: one step of Adam then makes a share of 0.5 one of 0.007 or 0.993
# Bytes of inputs and answers that are kept of one block.
MEMORY = 1 << 30


@dataclass(frozen=True)
class BRECQ(GPTQ):
    """Round as GPTQ does and learn the rounding of a block as soon as it was rounded; needs calibration data.

    Attributes:
        steps: of gradient descent for every block.
        batch: samples in each, of one calibration batch.
        mix: share of a block's inputs that is the original's; of few bits, whose errors it hides, better none.
    """

    steps: int = 400
    batch: int = 32
    mix: float = 0.0

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        if self.steps < 1 or self.batch < 1:
            found.append("steps and batch must be at least 1")
        if not 0 <= self.mix <= 1:
            found.append(f"mix is {self.mix}: it is a share, between 0 and 1")
        return found

    def jointly(self, study: Study, plan: Plan, model: nn.Module) -> Jointly | None:
        aware = study.task.has_calibration if self.data_aware is None else self.data_aware
        return Reconstruction(self, study, list(plan.layers), model) if aware else None


@dataclass(frozen=True)
class Block:
    """A part of a network that one tensor goes into and one comes out of.

    Attributes:
        name: of the module.
        layers: names of the layers inside that are rounded, without the module's.
        more: what it is called with beside the tensor.
        norms: of layers without a bias the batch norm inside that can take up a constant, by the layer's name.
    """

    name: str
    layers: tuple[str, ...]
    more: tuple[tuple[Any, ...], Mapping[str, Any]]
    norms: Mapping[str, str]

    def path(self, layer: str) -> str:
        """A layer's name in the network."""
        return f"{self.name}.{layer}" if layer else self.name


class Reconstruction:
    """Learns the rounding of every block in place as soon as its layers were rounded alone.

    The layers behind are then rounded for what the block has become. A block stays as it is where learning brings it no
    nearer to the original's answers.
    """

    def __init__(self, step: BRECQ, study: Study, names: Sequence[str], model: nn.Module) -> None:
        """Args:
        step: with its settings.
        study: of the original network.
        names: the layers that are to be rounded, in calling order.
        model: the network whose layers become rounded one after the other.
        """
        self.step, self.original, self.model = step, study.original, model
        self.blocks = find_blocks(study.original, names, study.task.inputs().on(study.original))
        self._waiting = {block.name: {block.path(layer) for layer in block.layers} for block in self.blocks}
        self._lockstep = study.lockstep(model, step.samples)
        self._generator = torch.Generator().manual_seed(study.seed)

    def after(self, name: str) -> bool:
        """A layer was rounded alone; whether its block was learnt for that."""
        for block in self.blocks:
            waiting = self._waiting[block.name]
            if name in waiting:
                waiting.remove(name)
                return not waiting and self._reconstruct(block)
        return False

    def restart(self) -> None:
        """All layers have changed."""
        self._lockstep.restart()

    def close(self) -> None:
        """No more layers come."""
        self._lockstep.close()

    def _reconstruct(self, block: Block) -> bool:
        layers = [layer_at(self.model, block.path(layer)) for layer in block.layers]
        gridded = [any(isinstance(c, Gridded) for c in constraints_on(layer)) for layer in layers]
        if not any(gridded):
            return False
        block = replace(block, layers=tuple(layer for layer, on in zip(block.layers, gridded, strict=True) if on))
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        room, step = MEMORY, self.step
        for was, now in self._lockstep.reached(block.name):
            assert was.answer is not None
            x = now.x.clone()
            held = was.x.clone() if step.mix else x, x, was.answer.clone()
            room -= sum(tensor.nbytes for tensor in held[0 if step.mix else 1 :])
            if room >= 0 or not kept:
                kept.append(held)
        return bool(kept) and _learn(
            block, self.original, self.model, kept, step.steps, step.batch, step.mix, self._generator
        )


def find_blocks(model: nn.Module, layers: Sequence[str], inputs: Inputs) -> list[Block]:
    """The parts of a network to be reconstructed, in calling order: modules as large as hold a few layers.

    A module serves that is called once, with one tensor and what is no tensor, and that gives one tensor. A Sequential
    serves where what it holds is single; layers that no such module holds are each a block.

    Args:
        model: the network.
        layers: names of those that are rounded.
        inputs: an example.
    """
    calls: dict[str, list[tuple[Any, Any, Any]]] = {}
    order: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(name, []).append((args, kwargs, output))

        return hook

    def begin(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            order.setdefault(name, len(order))

        return hook

    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        for name, module in model.named_modules():
            for handle in (
                module.register_forward_hook(watch(name), with_kwargs=True),
                module.register_forward_pre_hook(begin(name)),
            ):
                stack.callback(handle.remove)
        with torch.no_grad():
            inputs.into(model)

    def serves(name: str) -> bool:
        found = calls.get(name, [])
        if len(found) != 1:
            return False
        args, kwargs, output = found[0]
        held = [*args[1:], *kwargs.values()]
        return (
            bool(args)
            and isinstance(args[0], Tensor)
            and isinstance(output, Tensor)
            and not any(isinstance(extra, Tensor) for extra in held)
        )

    def inside(name: str) -> tuple[str, ...]:
        start = f"{name}."
        return tuple(n.removeprefix(start) for n in layers if n.startswith(start)) or (("",) if name in layers else ())

    found: list[str] = []

    def look(name: str, module: nn.Module) -> None:
        held = inside(name) if name else tuple(layers)
        if not held:
            return
        single = not isinstance(module, nn.Sequential) or all(not list(m.children()) for m in module)
        if name and serves(name) and len(held) <= MOST_LAYERS and (is_layer(module) or single):
            found.append(name)
            return
        for child, part in module.named_children():
            look(f"{name}.{child}" if name else child, part)

    look("", model)
    behind = norms_behind(model, layers, inputs)

    def norms(name: str) -> dict[str, str]:
        start = f"{name}."
        held = {layer: behind.get(f"{start}{layer}" if layer else name, "") for layer in inside(name)}
        return {layer: norm.removeprefix(start) for layer, norm in held.items() if norm.startswith(start)}

    found.sort(key=lambda name: order[name])
    return [Block(name, inside(name), (calls[name][0][0][1:], calls[name][0][1]), norms(name)) for name in found]


def _learn(
    block: Block,
    original: nn.Module,
    model: nn.Module,
    kept: Sequence[tuple[Tensor, Tensor, Tensor]],
    steps: int,
    batch: int,
    mix: float,
    generator: torch.Generator,
) -> bool:
    """Learn the rounding of one block; whether its answers come nearer than they were."""
    now, was = model.get_submodule(block.name), original.get_submodule(block.name)
    plain = released(now)
    plain = (copy.deepcopy(plain) if plain is now else plain).eval().requires_grad_(False)
    args, kwargs = block.more
    parts: list[_Part] = []
    for name in block.layers:
        layer, weight = layer_at(now, name), cast(Tensor, layer_at(was, name).weight).detach()
        made = next(c for c in constraints_on(layer) if isinstance(c, Gridded))
        exact = weight.float()
        scale = made.form.spread(made.scale.detach(), exact.shape).float()
        u = torch.zeros_like(made.scale, dtype=torch.float32).requires_grad_()
        shift = made.form.spread(made.zero_point, exact.shape).float()
        # Between what a value was rounded to and the next one on the side of what it was: GPTQ may have moved it far.
        rounded = cast(Tensor, layer.weight).detach().float()
        target = (rounded + (exact - rounded).clamp(-0.45 * scale, 0.45 * scale)) / scale
        below = target.floor()
        v = torch.logit((target - below).clamp(0.01, 0.99)).requires_grad_()
        masks = [c.mask for c in constraints_on(layer) if isinstance(c, Masked)]
        stay = torch.stack(masks).all(0) if masks else None
        parts.append(_Part(".".join(place(now, name)).removeprefix("."), made, v, u, below, shift, stay))

    def error(weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        answer: Tensor = functional_call(plain, dict(weights), (x, *args), dict(kwargs))
        return (answer - y).float().square().mean()

    def mean_error(weights: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return sum(float(error(weights, x, y)) * len(x) for _, x, y in kept) / sum(len(x) for _, x, _ in kept)

    before = mean_error({})
    if not before > 0:
        return False
    optimizer = torch.optim.Adam(
        [{"params": [p.v for p in parts], "lr": RATE}, {"params": [p.u for p in parts], "lr": RATE_OF_SCALES}]
    )
    with torch.enable_grad():
        for step in range(steps):
            original_x, x, y = kept[int(torch.randint(len(kept), (1,), generator=generator))]
            rows = torch.randperm(len(x), generator=generator)[:batch].to(x.device)
            x, y, original_x = x[rows], y[rows], original_x[rows]
            if mix and x.is_floating_point():
                x = torch.where(torch.rand(x.shape, generator=generator).to(x.device) < mix, original_x, x)
            temperature = STEEPEST ** (step / steps)
            loss = error({part.weight: part.soft(temperature).to(x.dtype) for part in parts}, x, y) / before
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    learnt = {part.weight: part.hard().to(plain.get_parameter(part.weight).dtype) for part in parts}
    wanted = _means(was, block, {}, [x for x, _, _ in kept])
    # Where the rounding was better before, constants must follow what the blocks in front have become all the same.
    for weights in (learnt, {}):
        values = weights | _constants(plain, block, weights, [x for _, x, _ in kept], wanted)
        if mean_error(values) < before:
            break
    else:
        return False
    with torch.no_grad():
        for part in parts if weights is learnt else ():
            part.made.scale.copy_(part.scale())
        for name, tensor in values.items():
            path, _, leaf = name.rpartition(".")
            where = now.get_submodule(path)
            beneath(where, leaf).copy_(tensor)
    return True


def _constants(
    plain: nn.Module,
    block: Block,
    weights: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    wanted: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The biases, or means of norms, that give every layer's outputs the means that are wanted, layer by layer."""
    made: dict[str, Tensor] = {}
    for name in block.layers:
        bias, norm = layer_at(plain, name).bias, block.norms.get(name)
        if name not in wanted or (norm is None and not isinstance(bias, Tensor)):
            continue
        lacking = wanted[name] - _means(plain, block, {**weights, **made}, batches)[name]
        if norm is None:
            made[f"{name}.bias" if name else "bias"] = cast(Tensor, bias) + lacking
        else:
            mean = cast(Tensor, plain.get_submodule(norm).running_mean)
            made[f"{norm}.running_mean"] = mean - lacking
    return made


def _means(
    module: nn.Module, block: Block, tensors: Mapping[str, Tensor], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The mean of every channel that a layer puts out, by layer, with these tensors in place of the block's own.

    Over all calls of a layer; one that is never called has none.
    """
    args, kwargs = block.more
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, answer: Tensor) -> None:
            channel = answer.ndim - (1 if isinstance(layer, nn.Linear) else cast(Tensor, layer.weight).ndim - 1)
            total = answer.mean([d for d in range(answer.ndim) if d != channel]) * len(answer)
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + len(answer)

        return hook

    with ExitStack() as stack, mode(module, training=False), torch.no_grad():
        for name in block.layers:
            stack.callback(layer_at(module, name).register_forward_hook(watch(name)).remove)
        for x in batches:
            functional_call(module, dict(tensors), (x, *args), dict(kwargs))
    return {name: total / counts[name] for name, total in sums.items()}


@dataclass(frozen=True)
class _Part:
    """One layer's rounding while it is learnt.

    Attributes:
        weight: the tensor's name in the block.
        made: what rounds it.
        v: whether each value becomes the number below, where it is negative, or that above.
        u: logarithm of what each scale is multiplied by.
        below: the numbers below.
        shift: the zero points.
        stay: where it is not masked; None without a mask.
    """

    weight: str
    made: Gridded
    v: Tensor
    u: Tensor
    below: Tensor
    shift: Tensor
    stay: Tensor | None

    def scale(self) -> Tensor:
        """The scales as they are learnt, with as many digits as they are stored with."""
        return short(self.made.scale.detach().float() * self.u.detach().exp(), self.made.form)

    def soft(self, temperature: float) -> Tensor:
        """The weight in between."""
        return self._values((self.v / temperature).sigmoid(), self.made.scale.detach().float() * self.u.exp())

    def hard(self) -> Tensor:
        """The weight as it is rounded."""
        return self._values((self.v.detach() >= 0).to(self.v.dtype), self.scale())

    def _values(self, up: Tensor, scale: Tensor) -> Tensor:
        form = self.made.form
        numbers = (self.below + up + self.shift).clamp(form.low, form.high) - self.shift
        found = numbers * form.spread(scale, numbers.shape)
        return found if self.stay is None else found * self.stay
