"""What a layer costs once one of its tensors is confined: arithmetic on what is stored, without running anything."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from featherweight.cost.cost import Cost
from featherweight.forms import Constraint, Stored, constraints_on, stored


def confined(whole: Cost, layer: nn.Module, form: Constraint) -> Cost:
    """The cost of a layer with a constraint put on it: other parameters and bytes, the same arithmetic.

    Args:
        whole: what the layer costs as it is.
        layer: the layer; not changed.
        form: the constraint.
    Raises:
        EditError: the constraint is not defined for this layer.
    """
    before, after = as_stored(layer, form.tensor), stored(form.build(layer, "meta"), form.tensor)
    params, size = whole.params - before.values + after.values, whole.bytes - before.bytes + after.bytes
    return replace(whole, params=params, bytes=size)


def as_stored(layer: nn.Module, name: str = "weight") -> Stored:
    """What a layer's tensor takes where it is kept, confined or not."""
    if constraints_on(layer, name):
        return stored(layer, name)
    tensor: Tensor = getattr(layer, name)
    return Stored(tensor.numel(), 8 * tensor.element_size())
