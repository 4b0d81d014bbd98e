"""Operations that rearrange: views, permutations, concatenations, pieces, repetitions, and tensors made anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import fx

from featherweight.graph.rules.call import Axes, Axis, Call, Unsupported, Value, rule


def concatenated(axes: Sequence[Axis]) -> Axis:
    """One dimension after another."""
    width = max(axis.rows.shape[1] for axis in axes)
    rows = [np.pad(axis.rows, ((0, 0), (0, width - axis.rows.shape[1]))) for axis in axes]
    return Axis(np.concatenate(rows), all(axis.zero for axis in axes))


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias")
def view(call: Call) -> Value:
    """Another shape of the same elements: dimensions are merged and split."""
    x = call.axes("self")
    return tuple(_regrouped(call, x, [len(a) for a in x], list(call.shape)))


def _regrouped(call: Call, axes: Axes, source: list[int], target: list[int]) -> list[Axis]:
    """Walk both shapes from the left, and merge and split between the points where they meet again."""
    if math.prod(source) != math.prod(target) or 0 in source:
        raise Unsupported("a view of an empty tensor")
    made: list[Axis] = []
    i = j = 0
    while i < len(source) or j < len(target):
        here, there = [], []
        if i < len(source) and source[i] == 1:
            i += 1
            continue
        if j < len(target) and target[j] == 1:
            made.append(call.fixed(1))
            j += 1
            continue
        here.append(axes[i])
        there.append(target[j])
        n, m = source[i], target[j]
        i, j = i + 1, j + 1
        while n != m:
            if n < m:
                here.append(axes[i])
                n *= source[i]
                i += 1
            else:
                there.append(target[j])
                m *= target[j]
                j += 1
        made += _pieces(call, here[0] if len(here) == 1 else call.merge(here), there)
    return made


def _pieces(call: Call, axis: Axis, lengths: list[int]) -> list[Axis]:
    made = []
    while len(lengths) > 1:
        length, *lengths = lengths
        rest = math.prod(lengths)
        if length == 1:
            made.append(call.fixed(1))
        elif rest == 1:
            made.append(axis)
            axis = call.fixed(1)
        else:
            first, axis = call.split(axis, length, rest)
            made.append(first)
    return [*made, axis]


@rule("permute")
def permute(call: Call) -> Value:
    """Dimensions in another order."""
    x = call.axes("self")
    return tuple(x[d] for d in call["dims"])


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> Value:
    """Two dimensions change places."""
    x = list(call.axes("self"))
    one, two = (call.get("dim0"), call.get("dim1")) if call.get("dim0") is not None else (call["axis0"], call["axis1"])
    x[one], x[two] = x[two], x[one]
    return tuple(x)


@rule("t", "numpy_T", "adjoint", "mT")
def turned(call: Call) -> Value:
    """The last two dimensions change places, or all are turned round."""
    x = call.axes("self")
    if len(x) > 2:
        return (*x[:-2], x[-1], x[-2]) if call.operation in ("adjoint", "mT") else tuple(reversed(x))
    return tuple(reversed(x))


@rule("movedim", "moveaxis")
def movedim(call: Call) -> Value:
    """Some dimensions move, the others keep their order."""
    x = call.axes("self")
    source, target = call.dims(call["source"], len(x)), call.dims(call["destination"], len(x))
    order = [d for d in range(len(x)) if d not in source]
    for to, which in sorted(zip(target, source, strict=True)):
        order.insert(to, which)
    return tuple(x[d] for d in order)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Value:
    """A dimension of length one comes in."""
    x = list(call.axes("self"))
    x.insert(call.dim(call["dim"], len(x) + 1), call.fixed(1))
    return tuple(x)


@rule("squeeze")
def squeeze(call: Call) -> Value:
    """Dimensions of length one go."""
    x = call.axes("self")
    dims = call.dims(call.get("dim"), len(x))
    return tuple(axis for d, axis in enumerate(x) if d not in dims or len(axis) != 1)


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Value:
    """A stretched dimension is as long as what it meets: it has labels of its own."""
    x, shape = call.axes("self"), call.shape
    made = []
    for d, length in enumerate(shape):
        k = d - (len(shape) - len(x))
        made.append(x[k] if k >= 0 and len(x[k]) == length else call.stretched(d, length))
    return tuple(made)


@rule("repeat")
def repeat(call: Call) -> Value:
    """The whole repeated along a dimension: copies of an index go together."""
    x, shape = call.axes("self"), call.shape
    made = []
    for d, length in enumerate(shape):
        k = d - (len(shape) - len(x))
        if k >= 0 and len(x[k]) == length:
            made.append(x[k])
        elif k < 0 or len(x[k]) == 1:
            made.append(call.stretched(d, length))
        else:
            made.append(call.merge([call.fixed(length // len(x[k])), x[k]]))
    return tuple(made)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Value:
    """Each index repeated in place: its copies go together."""
    x = list(call.axes("self"))
    times, d = call["repeats"], call.get("dim")
    if isinstance(times, fx.Node) or d is None:
        raise Unsupported("repeat_interleave by a tensor or over everything")
    d = call.dim(d, len(x))
    x[d] = call.merge([x[d], call.fixed(times)])
    return tuple(x)


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Value:
    """(channels · factor², h, w) → (channels, h · factor, w · factor)."""
    x, factor = call.axes("self"), call["upscale_factor"]
    first = x[-3][:: factor**2]
    call.join(x[-3], call.merge([first, call.fixed(factor**2)]))
    call.fix(x[-2:], "positions, not channels")
    return (*x[:-3], first, *(call.fixed(length) for length in call.shape[-2:]))


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Value:
    """Pixels of a square become channels: those made of one channel go together."""
    x, factor = call.axes("self"), call["downscale_factor"]
    call.fix(x[-2:], "positions, not channels")
    channels = call.merge([x[-3], call.fixed(factor**2)])
    return (*x[:-3], channels, *(call.fixed(length) for length in call.shape[-2:]))


@rule("channel_shuffle")
def channel_shuffle(call: Call) -> Value:
    """Channels of all groups in turn: one in every group goes together."""
    x, groups = list(call.axes("self")), call["groups"]
    x[1] = call.merge([call.tie(x[1], groups), call.fixed(groups)])
    return tuple(x)


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Value:
    # a tensor without elements and with one dimension is passed over, whatever the others' shapes
    """Along the dimension one after the other; in all others they meet."""
    parts = [
        axes for axes in (call.axes(node) for node in call["tensors"]) if not (len(axes) == 1 and not len(axes[0]))
    ]
    along = call.dim(call["dim"], len(parts[0]))
    made = []
    for d in range(len(parts[0])):
        here = [axes[d] for axes in parts]
        if d == along:
            made.append(concatenated([axis for axis in here if len(axis)]))
            continue
        for axis in here[1:]:
            call.join(here[0], axis)
        made.append(here[0].keeping(all(axis.zero for axis in here)))
    return tuple(made)


@rule("stack")
def stack(call: Call) -> Value:
    """Along a new dimension, none of which can go; in all others they meet."""
    parts = [call.axes(node) for node in call["tensors"]]
    made = []
    for here in zip(*parts, strict=True):
        for axis in here[1:]:
            call.join(here[0], axis)
        made.append(here[0].keeping(all(axis.zero for axis in here)))
    made.insert(call.dim(call["dim"], len(made) + 1), call.fixed(len(parts), "tensors put side by side"))
    return tuple(made)


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def split(call: Call) -> Value:
    """Pieces along one dimension."""
    x = call.axes("self")
    d = call.dim(call["dim"], len(x))
    made, start = [], 0
    for shape in call.results:
        piece = x[d][start : start + shape[d]]
        start += shape[d]
        made.append((*x[:d], _alone(call, piece), *x[d + 1 :]))
    return list(made)


@rule("unbind")
def unbind(call: Call) -> Value:
    """Taken apart along a dimension, none of which can go."""
    x = call.axes("self")
    d = call.dim(call["dim"], len(x))
    call.fix([x[d]], "it is taken apart one by one")
    return [(*x[:d], *x[d + 1 :]) for _ in range(len(x[d]))]


@rule("slice")
def slice_(call: Call) -> Value:
    """A stretch of a dimension; with a step other than one it is frozen."""
    x = list(call.axes("self"))
    d = call.dim(call["dim"], len(x))
    taken = range(len(x[d]))[slice(call["start"], call["end"], call["step"])]
    if len(taken) != call.shape[d]:
        raise Unsupported("a slice whose length depends on the values that go in")
    if len(taken) == len(x[d]):
        return tuple(x)
    x[d] = x[d][taken.start : taken.stop : taken.step] if len(taken) else x[d][:0]
    if call["step"] != 1:
        call.fix([x[d]], "every so many are taken of it")
        call.fix([call.axes("self")[d]], "every so many are taken of it")
    x[d] = _alone(call, x[d])
    return tuple(x)


@rule("narrow")
def narrow(call: Call) -> Value:
    """A stretch of a dimension by start and length."""
    x = list(call.axes("self"))
    d = call.dim(call["dim"], len(x))
    if isinstance(call["start"], fx.Node):
        raise Unsupported("narrow from a tensor")
    start = call["start"] % len(x[d])
    x[d] = _alone(call, x[d][start : start + call["length"]])
    return tuple(x)


@rule("select")
def select(call: Call) -> Value:
    """One index of a dimension, which has to stay."""
    x = call.axes("self")
    d = call.dim(call["dim"], len(x))
    index = call["index"]
    if not isinstance(index, int):
        raise Unsupported("an index that depends on the values that go in")
    index %= len(x[d])
    call.fix([x[d][index : index + 1]], "one of it is picked out")
    return (*x[:d], *x[d + 1 :])


@rule("index_select")
def index_select(call: Call) -> Value:
    """Indices of a dimension by a constant list, which is counted anew when slices go."""
    x = list(call.axes("self"))
    d = call.dim(call["dim"], len(x))
    index = call.constant(call.node.args[2])  # type: ignore[arg-type]
    if index is None or index.is_meta:
        call.fix([x[d], *call.axes("index")], "an index that is computed reads it")
        x[d] = call.fixed(call.shape[d], "an index that is computed reads it")
        return tuple(x)
    x[d] = _alone(call, x[d][index.numpy(force=True).reshape(-1)])
    # the index is as long as what it picks; its numbers are counted anew when the slices go
    call.join(call.axes("index")[0], x[d])
    return tuple(x)


@rule("index")
def index(call: Call) -> Value:
    """x[:, i, j]: the dimensions that are indexed stay, the others pass."""
    x = call.axes("self")
    taken = [d for d, i in enumerate(call["indices"]) if i is not None]
    call.fix([x[d] for d in taken], "an index reads it")
    for node in call["indices"]:
        if isinstance(node, fx.Node):
            call.fix(call.axes(node), "it indexes another tensor")
    passing = [x[d] for d in range(len(x)) if d not in taken]
    width = len(call.shape) - len(passing)
    together = taken == list(range(taken[0], taken[-1] + 1))
    first = taken[0] if together else 0
    made = passing[:first], passing[first:]
    return (*made[0], *(call.fixed(n, "an index reads it") for n in call.shape[first : first + width]), *made[1])


@rule("gather", "take_along_dim")
def gather(call: Call) -> Value:
    """Read at indices that are computed: what they read stays."""
    x, index_ = call.axes("self"), call.axes("index")
    d = call.dim(call["dim"], len(x))
    call.fix([x[d], *index_], "an index reads it")
    for k, (one, two) in enumerate(zip(x, index_, strict=True)):
        if k != d:
            call.fix([one], "an index reads it") if len(one) != len(two) else call.join(one, two)
    return tuple(call.fixed(n, "an index reads it") for n in call.shape)


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Value:
    """Padding before and after a dimension; padding with zeros is like more slices."""
    x = list(call.axes("self"))
    amounts, mode, value = call["pad"], call.get("mode") or "constant", call.get("value") or 0
    for i in range(len(amounts) // 2):
        low, high, d = amounts[2 * i], amounts[2 * i + 1], len(x) - 1 - i
        if low == high == 0:
            continue
        if mode != "constant" or low < 0 or high < 0:
            call.fix([x[d]], "it is padded with its own values or cut")
            x[d] = call.fixed(call.shape[d], "it is padded with its own values or cut")
        else:
            x[d] = concatenated(
                [
                    call.fixed(n, "padding") if n != len(x[d]) or k != 1 else x[d]
                    for k, n in enumerate((low, len(x[d]), high))
                    if n
                ]
            )
    return tuple(axis.keeping(value == 0) for axis in x)


@rule(
    "roll",
    "flip",
    "cumsum",
    "cumprod",
    "sort",
    "argsort",
    "softmax",
    "_softmax",
    "log_softmax",
    "softmin",
    "logcumsumexp",
)
def ordered(call: Call) -> Value:
    """All of a dimension counts, or its order does: it stays."""
    x = call.axes("self")
    dims = call.get("dims") if call.operation in ("roll", "flip") else call.get("dim")
    which = call.dims(dims if dims is not None else (-1 if call.operation.endswith("sort") else None), len(x))
    call.fix([x[d] for d in which], f"{call.operation} runs along it")
    through = call.operation in ("roll", "flip", "cumsum", "cumprod")
    made = tuple(axis.keeping(through) for axis in x)
    if "softmax" in call.operation:
        for axis in x[1:-2] if len(x) >= 4 else ():
            call.role(axis, "heads", "heads")
    return [made] * len(call.node.meta["val"]) if isinstance(call.node.meta["val"], (tuple, list)) else made


@rule("tril", "triu")
def triangle(call: Call) -> Value:
    """The upper or lower triangle of matrices, whose rows and columns stay."""
    x = call.axes("self")
    call.fix(x[-2:], "a triangle is cut out of it")
    return x


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def made_whole(call: Call) -> Value:
    """As long as what it meets."""
    zero = "zeros" in call.operation or call.get("fill_value") == 0
    return tuple(call.stretched(d, length, zero=zero) for d, length in enumerate(call.shape))


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli")
def made_like(call: Call) -> Value:
    """A new tensor with the shape of another."""
    zero = call.operation == "zeros_like" or call.get("fill_value") == 0
    return tuple(axis.keeping(zero) for axis in call.axes("self"))


@rule(
    "arange",
    "scalar_tensor",
    "eye",
    "tensor",
    "linspace",
    "hann_window",
    "hamming_window",
    "rand",
    "randn",
    "tril_indices",
)
def made_from_values(call: Call) -> Value:
    """A tensor out of numbers: nothing in it belongs to a slice."""
    return tuple(call.fixed(length) for length in call.shape)


def _alone(call: Call, axis: Axis) -> Axis:
    """What is one long is stretched where it meets others: it never goes, and is not narrowed."""
    if len(axis) != 1:
        return axis
    call.fix([axis], "a single slice is taken of it")
    return call.fixed(1)
