"""Attention's projections as layers: `nn.MultiheadAttention` multiplies by weights of its own and calls no layer.

Everything here is of the module's stock forward, which reads these tensors where they are needed: constraints on them
hold in it, in its fused kernel and in what is exported.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from featherweight.forms.constraint import Constrained, beneath, constraints_on, parametrized

# Its own two-dimensional weights, outputs first: queries, keys and values in one, or apart where their widths differ.
WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# The layer whose weight and bias it takes past the layer.
OUTPUT = "out_proj"


class Projection(nn.Linear):
    """Stands for one of attention's own weights: its ``weight`` is that parameter itself, with what is on it.

    It has no bias: ``in_proj_bias`` stays as it is.
    """


def place(model: nn.Module, name: str) -> tuple[str, str]:
    """Where a layer's weight is: the name of the module that has it, and the tensor's name there.

    Args:
        model: the network.
        name: of a layer, or of one of attention's own weights.
    """
    owner, _, tensor = name.rpartition(".")
    return (owner, tensor) if tensor in WEIGHTS and attention_of(model, name) is not None else (name, "weight")


def attention_of(model: nn.Module, name: str) -> nn.MultiheadAttention | None:
    """The attention that a layer of that name is a projection of; None for others."""
    owner, _, last = name.rpartition(".")
    try:
        held = model.get_submodule(owner)
    except AttributeError:
        return None
    return held if isinstance(held, nn.MultiheadAttention) and last in (*WEIGHTS, OUTPUT) else None


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, which shares its tensors with the model."""
    owner, tensor = place(model, name)
    module = model.get_submodule(owner)
    return projection(module, tensor) if isinstance(module, nn.MultiheadAttention) else module


def projections(module: nn.MultiheadAttention) -> dict[str, Projection]:
    """Attention's own weights as layers, by the tensor's name; without such as a parametrization of others is on."""
    held = parametrized(module)
    plain = {name for name in WEIGHTS if module._parameters.get(name) is not None}
    ours = {name for name in held if all(isinstance(one, Constrained) for one in held[name])}
    return {name: projection(module, name) for name in WEIGHTS if name in plain | ours}


def projection(module: nn.Module, tensor: str) -> Projection:
    """One of attention's own weights as a layer."""
    original = beneath(module, tensor)
    made = Projection(original.shape[1], original.shape[0], bias=False, device="meta")
    made.register_parameter("weight", original if isinstance(original, nn.Parameter) else nn.Parameter(original))
    for constraint in constraints_on(module, tensor):
        parametrize.register_parametrization(made, "weight", constraint, unsafe=True)
    made.training = module.training
    return made
