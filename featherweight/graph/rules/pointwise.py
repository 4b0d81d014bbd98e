"""Operations that treat every element alone: dimensions stay as they are, and those that meet go together."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from featherweight.graph.rules.call import Axis, Call, Unsupported, Value, rule

# What is zero stays zero.
_THROUGH_ZERO = """
relu relu6 gelu silu tanh hardswish leaky_relu elu selu celu mish neg abs sin tan sqrt erf sign floor ceil
round trunc square expm1 log1p asin atan sinh asinh hardshrink softshrink tanhshrink softsign dropout
feature_dropout alpha_dropout feature_alpha_dropout contiguous clone detach alias to _to_copy type_as
lift_fresh_copy lift_fresh float double half bfloat16 nan_to_num native_dropout rrelu positive
"""

# What is zero becomes something else.
_ABOVE_ZERO = """
sigmoid hardsigmoid softplus logsigmoid log_sigmoid exp exp2 cos cosh erfc isnan isinf isfinite logical_not
bitwise_not acos threshold logit
"""

_UNDEFINED_AT_ZERO = "log log2 log10 reciprocal rsqrt"

_COMPARISONS = """
ge gt le lt eq ne logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__
fmod remainder floor_divide atan2 isclose
"""


@rule(*_THROUGH_ZERO.split())
def through_zero(call: Call) -> Value:
    """A function of each element that is zero at zero."""
    return call.axes(call.node.args[0])  # type: ignore[arg-type]


@rule(*_ABOVE_ZERO.split())
def above_zero(call: Call) -> Value:
    """A function of each element that is not zero at zero."""
    return tuple(axis.keeping(False) for axis in call.axes(call.node.args[0]))  # type: ignore[arg-type]


@rule(*_UNDEFINED_AT_ZERO.split())
def undefined_at_zero(call: Call) -> Value:
    """A function of each element without a value at zero."""
    axes = call.axes("self")
    _fix_zeros(call, axes, f"{call.operation} of a slice that is zero is not a number")
    return tuple(axis.keeping(False) for axis in axes)


@rule("add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin", "lerp", "addcmul", "addcdiv", "hypot")
def added(call: Call) -> Value:
    """Zero only where all that is added is."""
    numbers = [call.number(a) for a in call.node.args[:2] if not call.is_tensor(a)]
    return _meeting(call, all, numbers)


@rule("mul")
def multiplied(call: Call) -> Value:
    """Zero where any factor is."""
    return _meeting(call, any, [])


@rule("div", "true_divide")
def divided(call: Call) -> Value:
    """Zero where the dividend is, unless the divisor is zero too."""
    if not isinstance(call.node.args[0], fx.Node):
        return undefined_at_zero(call)
    dividend, divisor = call.axes("self"), call.given("other") or ()
    aligned = call.broadcast([dividend, divisor])
    _fix_zeros(call, divisor, "division by a slice that is zero is not a number")
    return tuple(_made(call, d, here, here[0] is not None and here[0].zero) for d, here in enumerate(aligned))


@rule("pow")
def power(call: Call) -> Value:
    """Zero stays zero under a positive power only."""
    exponent = call.get("exponent")
    if isinstance(exponent, (int, float)):
        axes = call.axes("self")
        if exponent < 0:
            _fix_zeros(call, axes, "a negative power of a slice that is zero is not a number")
        return tuple(axis.keeping(exponent > 0) for axis in axes)
    return compared(call)


@rule("clamp", "clip", "hardtanh", "clamp_min", "clamp_max")
def clamped(call: Call) -> Value:
    """Zero stays zero where the bounds enclose it."""
    low = call.get("min") if call.operation != "hardtanh" else call["min_val"]
    high = call.get("max") if call.operation != "hardtanh" else call["max_val"]
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return compared(call)
    through = (low is None or low <= 0) and (high is None or high >= 0)
    return tuple(axis.keeping(through) for axis in call.axes("self"))


@rule(*_COMPARISONS.split())
def compared(call: Call) -> Value:
    """Elements that meet, with an answer that is not zero where they are."""
    return _meeting(call, lambda _: False, [])


@rule("where")
def chosen(call: Call) -> Value:
    """Zero where both alternatives are."""
    if not isinstance(call.get("self"), fx.Node) or not isinstance(call.get("other"), fx.Node):
        return compared(call)
    tensors = [call.axes("condition"), call.axes("self"), call.axes("other")]
    aligned = call.broadcast(tensors)
    return tuple(
        _made(call, d, here, all(axis is not None and axis.zero for axis in here[1:])) for d, here in enumerate(aligned)
    )


@rule("masked_fill")
def filled(call: Call) -> Value:
    """Filled with a value where a mask says so: zero stays zero if that value is zero."""
    aligned = call.broadcast([call.axes("self"), call.axes("mask")])
    zero = call.get("value") == 0 and not isinstance(call.get("value"), fx.Node)
    return tuple(_made(call, d, here, zero and here[0] is not None and here[0].zero) for d, here in enumerate(aligned))


@rule("copy")
def copied(call: Call) -> Value:
    """Overwritten by another tensor: zero where that one is."""
    target, source = call.axes("self"), call.axes("src")
    aligned = call.broadcast([target, source])
    return tuple(_made(call, d, here, here[1] is not None and here[1].zero) for d, here in enumerate(aligned))


@rule("fill", "zero")
def overwritten(call: Call) -> Value:
    """Overwritten by one value."""
    zero = call.operation == "zero" or call.get("value") == 0
    return tuple(axis.keeping(zero) for axis in call.axes("self"))


@rule("prelu")
def prelu(call: Call) -> Value:
    """A slope for each channel meets it."""
    x, slope = call.axes("self"), call.axes("weight")
    if len(slope) == 1 and len(slope[0]) > 1:
        call.join(x[1 if len(x) > 1 else 0], slope[0])
    return x


@rule("glu")
def glu(call: Call) -> Value:
    """The first half of a dimension, times the sigmoid of the second."""
    axes = list(call.axes("self"))
    d = call.dim(call["dim"], len(axes))
    half = len(axes[d]) // 2
    axes[d] = call.join(axes[d][:half], axes[d][half:])
    return tuple(axes)


def _meeting(call: Call, combine: Callable[..., bool], numbers: list[object]) -> Value:
    """Broadcast; a removed slice is zero where `combine` says so of what meets there."""
    if any(not isinstance(n, (int, float)) for n in numbers):
        raise Unsupported(f"{call.operation} with {numbers}")
    shifted = any(n != 0 for n in numbers)
    aligned = call.broadcast(call.tensors())
    made = []
    for d, here in enumerate(aligned):
        if combine is all:
            zero = not shifted and all(axis is not None and axis.zero for axis in here)
        else:
            zero = combine is any and any(axis is not None and axis.zero for axis in here)
        made.append(_made(call, d, here, zero))
    return tuple(made)


def _made(call: Call, d: int, here: list[Axis | None], zero: bool) -> Axis:
    """One dimension of the result; a length of 1 has nothing to narrow."""
    present = next((axis for axis in here if axis is not None), None)
    if present is None:
        return call.fixed(call.shape[d])
    kept = next((axis for axis in here if axis is not None and axis.zero == zero), None)
    return kept if kept is not None else Axis(present.rows, zero)


def _fix_zeros(call: Call, axes: tuple[Axis, ...], text: str) -> None:
    call.fix([axis for axis in axes if axis.zero and len(axis) > 1], text)
