"""Pruning in the middle of a training run: the optimizer goes on with the narrowed parameters and their momenta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.graph.narrow import Narrowing
from featherweight.graph.trace import GraphError


def narrow_optimizer(
    optimizer: torch.optim.Optimizer, before: nn.Module, after: nn.Module, narrowing: Narrowing
) -> None:
    """Give an optimizer, in place, the narrowed model's parameters, with momenta and all other state cut alike.

    Parameter groups keep their settings, so schedulers go on as they are. An averaged model (EMA), PyTorch's
    `AveragedModel` too, is narrowed by ``narrowing.apply(averaged)``.

    Args:
        optimizer: of the model before.
        before: the model that was narrowed.
        after: the narrowed model, as `narrow` or ``narrowing.apply`` gives it.
        narrowing: what was cut.
    Raises:
        GraphError: the optimizer holds a parameter that is not the model's, or whose state does not have its shape;
            nothing was changed then.
    """
    names = {id(parameter): name for name, parameter in before.named_parameters()}
    successors = dict(after.named_parameters())
    cut: dict[int, dict[str, Any]] = {}
    groups: list[list[nn.Parameter]] = []
    for group in optimizer.param_groups:
        found = []
        for old in group["params"]:
            name = names.get(id(old))
            if name is None or name not in successors:
                raise GraphError(f"the optimizer holds a parameter of shape {tuple(old.shape)} that is not the model's")
            found.append(successors[name])
            state = optimizer.state.get(old, {})
            cut[id(old)] = {key: _cut(value, old, name, narrowing) for key, value in state.items()}
        groups.append(found)
    for group, found in zip(optimizer.param_groups, groups, strict=True):
        for old, new in zip(group["params"], found, strict=True):
            optimizer.state.pop(old, None)
            if cut[id(old)]:
                optimizer.state[new] = cut[id(old)]
        group["params"] = found


def _cut(value: Any, parameter: Tensor, name: str, narrowing: Narrowing) -> Any:
    """The part of one entry of a parameter's state that belongs to what stays of it."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    dims = narrowing.tensors.get(name, {})
    if dims and value.shape != parameter.shape:
        raise GraphError(
            f"the optimizer's state of {name} is {tuple(value.shape)}, its parameter {tuple(parameter.shape)}: "
            "it cannot be told what of it belongs to the slices that stay"
        )
    for dim, kept in dims.items():
        value = value.index_select(dim, torch.tensor(kept, device=value.device))
    return value
