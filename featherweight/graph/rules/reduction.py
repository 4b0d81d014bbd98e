"""Sums, means and extremes over dimensions."""

from __future__ import annotations

from typing import Any

from torch import fx

from featherweight.graph.rules.call import Axis, Call, Value, arguments, operation_of, read_by, rule
from featherweight.graph.rules.pointwise import compared

_SUMS = ("sum", "mean", "linalg_vector_norm", "norm", "nansum", "frobenius_norm")
_CASTS = frozenset(("to", "_to_copy", "type_as", "float", "double", "half", "bfloat16", "alias", "contiguous", "clone"))
_CLAMPS = ("clamp", "clamp_min", "clip")
# What may stand between a norm's mean of squares and the division by it, with the power it raises it to.
_POWERS = {
    "sqrt": 0.5,
    "rsqrt": -0.5,
    "reciprocal": -1.0,
    **dict.fromkeys((*_CASTS, *_CLAMPS, "add", "mul", "div", "unsqueeze"), 1.0),
}


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
        call.sums(x[d])
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
    """Whether a mean is a norm's, of what it centres or of squares: without slices it is over those that are kept.

    Of any other mean, removed slices count as the zeros they would be.
    """
    if operation_of(node) != "mean":
        return False
    of = _uncast(node.args[0])
    within = [n for n in _after_casts(of) if n.op == "call_function"]
    within += [after for n in within if operation_of(n) == "sub" for after in _after_casts(n)]
    means = [after for n in within if _squared(n) is not None for after in _after_casts(n)]
    return any(node in _norm(mean) for mean in (node, *means))


def _norm(mean: fx.Node) -> set[fx.Node]:
    """The means of the norm that divides by the root of this one: of squares, and what is centred by; else none.

    They are for nothing else, so that it makes no difference to anything but the norm what they are over.
    """
    if mean.op != "call_function" or operation_of(mean) != "mean" or (squared := _squared(mean.args[0])) is None:
        return set()
    divided = _divided(mean)
    of = {_uncentred(n, mean) for n in (squared, *divided.values())}
    centres = {u for n in (squared, *divided.values()) if (u := _centre(n, mean)) is not None}
    if not divided or len(of) > 1:
        return set()
    square = _uncast(mean.args[0])
    for centred in (n for centre in centres for n in _after_casts(centre)):
        uses = _after_casts(centred)
        if _centre(centred, mean) not in centres or any(use is not square and use not in divided for use in uses):
            return set()
    return set() if centres and _after_casts(square) != [mean] else {mean, *centres}


def _divided(mean: fx.Node) -> dict[fx.Node, fx.Node]:
    """Divisions by the root of a mean, with what they divide; none if anything else becomes of the mean."""
    found: dict[fx.Node, fx.Node] = {}
    reached = [(user, mean, 1.0) for user in mean.users]  # who uses which power of the mean
    while reached:
        user, value, power = reached.pop()
        first, other = (*user.args, None, None)[:2]
        operation = operation_of(user) if user.op == "call_function" else ""
        if operation in ("div", "mul") and isinstance(first, fx.Node) and isinstance(other, fx.Node):
            dividend, divisor = (first, other) if operation == "div" or other is value else (other, first)
            if divisor is not value or power != (0.5 if operation == "div" else -0.5):
                return {}
            found[user] = dividend
            continue
        beside = [n for n in user.all_input_nodes if n is not value and read_by(n) is None]
        exponent = other if operation == "pow" else _POWERS.get(operation)
        if first is not value or not isinstance(exponent, (int, float)) or (beside and operation not in _CASTS):
            return {}
        reached += [(after, user, power * exponent) for after in user.users]
    return found


def _squared(node: Any) -> fx.Node | None:
    """What a node is the square of."""
    node = _uncast(node)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    first, other = (*node.args, None, None)[:2]
    operation = operation_of(node)
    if operation == "square" or (operation == "pow" and other == 2) or (operation == "mul" and first is other):
        return first if isinstance(first, fx.Node) else None
    return None


def _centre(node: fx.Node, like: fx.Node) -> fx.Node | None:
    """The mean that was taken off a tensor, if it is the tensor's own along the dimensions of another mean."""
    node = _uncast(node)
    if node.op != "call_function" or operation_of(node) != "sub" or node.kwargs:
        return None
    of, centre = (_uncast(n) for n in node.args)
    if not isinstance(centre, fx.Node) or centre.op != "call_function" or operation_of(centre) != "mean":
        return None
    return centre if along(centre) == along(like) and _uncast(centre.args[0]) is of else None


def _uncentred(node: fx.Node, like: fx.Node) -> Any:
    """A tensor before it was cast and centred."""
    return _uncast(node) if _centre(node, like) is None else _uncast(_uncast(node).args[0])


def along(mean: fx.Node) -> set[int]:
    """The dimensions a mean is taken along."""
    ndim, given = mean.args[0].meta["val"].ndim, arguments(mean).get("dim")  # type: ignore[union-attr]
    return {d % ndim for d in given} if given else set(range(ndim))


def _uncast(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.op == "call_function" and operation_of(node) in _CASTS:
        node = node.args[0]
    return node


def _after_casts(node: fx.Node) -> list[fx.Node]:
    """Who uses a tensor, itself or in another type."""
    cast = [n for n in node.users if n.args and n.args[0] is node and _uncast(n) is not n]
    return [user for user in node.users if user not in cast] + [after for user in cast for after in _after_casts(user)]


def _after(call: Call, axis: Axis) -> Axis:
    through = (*_SUMS, "amax", "amin", "max", "min", "var", "std", "prod", "median")
    return axis.keeping(call.operation in through)
