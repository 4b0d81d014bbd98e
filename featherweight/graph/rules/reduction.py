"""Sums, means and extremes over dimensions."""

from __future__ import annotations

from torch import fx

from featherweight.graph.rules.call import Axis, Call, Value, operation_of, rule
from featherweight.graph.rules.pointwise import compared

_SUMS = ("sum", "mean", "linalg_vector_norm", "norm", "nansum", "frobenius_norm")


@rule(
    *_SUMS,
    *("amax", "amin", "max", "min", "any", "all", "var", "std", "var_mean", "std_mean", "argmax", "argmin", "prod"),
    *("logsumexp", "median", "topk", "count_nonzero", "aminmax"),
)
def reduced(call: Call) -> Value:
    """A sum is the same without slices that are zero; any other reduction keeps what it runs over."""
    if isinstance(call.get("other"), fx.Node):  # max(a, b)
        return compared(call)
    x = call.axes("self")
    given = call.get("dim")
    if given is None and call.operation == "topk":
        given = -1
    dims = call.dims(given if not isinstance(given, bool) else None, len(x))
    summed = call.operation in _SUMS and (call.get("ord") in (None, 2) and call.get("p") in (None, 2))
    for d in dims:
        if not summed:
            call.fix([x[d]], f"{call.operation} runs along it")
        elif not x[d].zero and not statistic(call.node):
            call.fix([x[d]], "a sum over slices that are not zero where their weights are")
    value = call.node.meta["val"]
    several = isinstance(value, (tuple, list))
    shape = call.shape
    if len(shape) == len(x):
        made = tuple(call.fixed(shape[d]) if d in dims else axis for d, axis in enumerate(x))
    else:
        made = tuple(axis for d, axis in enumerate(x) if d not in dims)
    made = tuple(_after(call, axis) for axis in made)
    return [made] * len(value) if several else made


def statistic(node: fx.Node) -> bool:
    """Whether a mean is a norm's: of squares, on the way to a root. Without slices it is over those that are kept."""
    if operation_of(node) != "mean":
        return False
    squared = node.args[0]
    if not isinstance(squared, fx.Node) or operation_of(squared) not in ("pow", "square", "mul"):
        return False
    reached = list(node.users)
    for _ in range(3):
        if any(operation_of(n) in ("rsqrt", "sqrt") for n in reached):
            return True
        reached = [user for n in reached if operation_of(n) in ("add", "clamp", "to", "_to_copy") for user in n.users]
    return False


def _after(call: Call, axis: Axis) -> Axis:
    through = (*_SUMS, "amax", "amin", "max", "min", "var", "std", "prod", "median")
    return axis.keeping(call.operation in through)
