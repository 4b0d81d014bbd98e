"""What attention multiplies by its projections, of which it calls none as a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.batch import Inputs, mode
from featherweight.forms import attention_of, parametrized, place

Rows = tuple[int, int]
# Told of a product: the projection's name, which of the weight's rows, what goes in and what comes out, both
# (samples, positions, channels); what it returns takes the place of what comes out.
Told = Callable[[str, Rows, Tensor, Tensor], Tensor | None]


@contextmanager
def products(model: nn.Module, names: Iterable[str], told: Told) -> Iterator[None]:
    """Inside, `told` is told of every product with these of the model's layers that are attention's projections.

    Attention whose queries are its keys and values too multiplies by all rows of ``in_proj_weight`` at once, other
    attention by parts of them. Meanwhile PyTorch's own `linear` is replaced, in all threads; what others do
    goes through it unchanged.
    """
    held = {name: attention for name in names if (attention := attention_of(model, name)) is not None}
    if not held:
        yield
        return
    samples: list[int] = []  # of each attention that is running
    weights: dict[int, tuple[str, Tensor]] = {}

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        query = args[0] if args else kwargs["query"]
        samples.append(1 if query.ndim < 3 else query.shape[0 if module.batch_first else 1])

    def leave(module: Any, args: Any, output: Any) -> None:
        samples.pop()

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        answer = plain(input, weight, bias)
        base = weight if id(weight) in weights else weight._base
        name, whole = weights.get(id(base), ("", weight))
        if not name or not samples:
            return answer
        first = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)

        def by_sample(tensor: Tensor) -> Tensor:  # attention has positions first, whatever batch_first says
            return tensor.reshape(-1, samples[-1], tensor.shape[-1]).transpose(0, 1)

        made = told(name, (first, first + len(weight)), by_sample(input), by_sample(answer))
        return answer if made is None else made.transpose(0, 1).reshape(answer.shape)

    with ExitStack() as stack:
        places = {name: place(model, name) for name in held}
        tensors = {name: (model.get_submodule(owner), tensor) for name, (owner, tensor) in places.items()}
        if any(tensor in parametrized(module) for module, tensor in tensors.values()):
            stack.enter_context(parametrize.cached())  # so that such a weight is one tensor, and is known again
        weights |= {id(w): (name, w) for name, (module, t) in tensors.items() for w in [getattr(module, t)]}
        for module in set(held.values()):
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        # Not a TorchFunctionMode: F.multi_head_attention_forward is one function to it, and is run outside of it.
        plain, F.linear = F.linear, linear
        stack.callback(setattr, F, "linear", plain)
        yield


def multiplied(model: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, set[Rows]]:
    """Which rows of attention's projections one run multiplies by at once, by name; without those it never does.

    Args:
        model: the network.
        names: of its layers.
        inputs: of the run, on the model's device.
    """
    found: dict[str, set[Rows]] = {}

    def note(name: str, rows: Rows, x: Tensor, answer: Tensor) -> None:
        found.setdefault(name, set()).add(rows)

    with mode(model, training=False), torch.no_grad(), products(model, names, note):
        inputs.into(model)
    return found


def apart(rows: Iterable[Rows]) -> bool:
    """Whether no row is in two of these."""
    ordered = sorted(rows)
    return all(end <= start for (_, end), (start, _) in pairwise(ordered))
