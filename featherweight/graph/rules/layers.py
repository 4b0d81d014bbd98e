"""Convolutions, norms, pools, embeddings and recurrent layers."""

from __future__ import annotations

from torch import fx

from featherweight.graph.rules.call import Axes, Axis, Call, Unsupported, Value, arguments, operation_of, rule
from featherweight.graph.rules.shapes import concatenated

_KERNEL = "the extent of a kernel"
_PLACE = "positions, not channels"


@rule(
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
    "_convolution",
)
def convolution(call: Call) -> Value:
    """Weights are (outputs, inputs / groups, *kernel); of transposed convolutions (inputs, outputs / groups, *kernel).

    Channels are (groups, channels per group), groups outermost. Of a depthwise convolution a group goes with its
    channel; of others every group keeps the same channels.
    """
    x, weight, bias = call.axes("input"), call.axes("weight"), call.given("bias")
    transposed = "transpose" in call.operation or bool(call.get("transposed"))
    groups = call["groups"]
    if call.computed("groups"):
        raise Unsupported("a convolution whose number of groups depends on the batch")
    if len(x) != len(weight):
        raise Unsupported("a convolution of an input without a batch dimension")
    call.fix(weight[2:], _KERNEL)
    call.fix(x[2:], _PLACE)
    if groups == 1:
        made, inputs = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
        _consume(call, x[1], inputs)
        call.role(inputs, "consumer", "channels")
    elif transposed:
        made = _grouped_transposed(call, x[1], weight, groups)
    else:
        made = _grouped(call, x[1], weight, groups)
    if groups == 1 or transposed or len(weight[1]) > 1:
        call.role(weight[1 if transposed else 0], "producer", "channels")
    if bias is not None:
        call.join(made, bias[0])
        made = made.keeping(bias[0].zero)
    return (x[0], made, *(call.fixed(length, _PLACE) for length in call.shape[2:]))


def _grouped(call: Call, x: Axis, weight: Axes, groups: int) -> Axis:
    outputs, inputs = len(weight[0]) // groups, len(weight[1])
    if inputs == 1:  # depthwise: (channels · multiplier, 1, *kernel)
        if outputs == 1:
            call.join(weight[0], x)
            return weight[0]
        outer, inner = call.split(weight[0], groups, outputs)
        call.join(outer, x)
        return call.merge([outer, inner])
    _consume(call, call.tie(x, groups), weight[1])
    call.role(weight[1], "consumer", "channels")
    call.tie(weight[0], groups)
    return weight[0]


def _grouped_transposed(call: Call, x: Axis, weight: Axes, groups: int) -> Axis:
    inputs, outputs = len(weight[0]) // groups, len(weight[1])
    if inputs == 1:  # depthwise: (channels, multiplier, *kernel)
        call.join(weight[0], x)
        return weight[0] if outputs == 1 else call.merge([weight[0], weight[1]])
    call.role(weight[0], "consumer", "channels")
    _consume(call, x, weight[0])
    call.tie(x, groups)
    return call.merge([call.fixed(groups, "the groups of a grouped convolution"), weight[1]])


def _consume(call: Call, x: Axis, weight: Axis) -> None:
    call.join(x, weight)
    if not x.zero and not weight.zero:
        call.fix([x], "a sum over slices that are not zero where their weights are")


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm")
def channel_norm(call: Call) -> Value:
    """Every channel alone; with a scale and a shift, a removed channel is zero after it.

    Statistics that are not the running ones are taken along all other dimensions: of a standardised weight, along its
    inputs.
    """
    x = list(call.axes("input"))
    if call.operation == "instance_norm" or call.given("running_mean") is None:
        along = x[2:] if call.operation == "instance_norm" else [x[0], *x[2:]]
        call.fix(along, "a mean and a variance are taken along it")
    scaled = [call.given(name) for name in ("weight", "bias", "running_mean", "running_var")]
    for tensor in scaled:
        if tensor is not None:
            call.join(x[1], tensor[0])
    if scaled[0] is not None:
        x[1] = Axis(x[1].rows, scaled[1] is None or scaled[1][0].zero)
    made = tuple(x)
    return [made, None, None] if isinstance(call.node.meta["val"], (tuple, list)) else made


@rule("group_norm")
def group_norm(call: Call) -> Value:
    """Statistics are over the channels of a group: every group keeps the same ones."""
    x = list(call.axes("input"))
    groups = call["num_groups"]
    if call.computed("num_groups"):
        raise Unsupported("a group norm whose number of groups depends on the batch")
    if groups > 1:
        call.tie(x[1], groups)
    weight, bias = call.given("weight"), call.given("bias")
    for tensor in (weight, bias):
        if tensor is not None:
            call.join(x[1], tensor[0])
    if len(x[1]) == groups:  # a group of one channel
        return tuple(x)
    call.sums(x[1])
    x[1] = Axis(x[1].rows, weight is not None)
    return tuple(x)


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Value:
    """Statistics are over the last dimensions: over what is kept of them."""
    x = list(call.axes("input"))
    weight, bias = call.given("weight"), call.given("bias")
    first = len(x) - len(call["normalized_shape"])
    for tensor in (weight, bias):
        if tensor is not None:
            for d, axis in enumerate(tensor):
                call.join(x[first + d], axis)
    for d in range(first, len(x)):
        call.sums(x[d])
        x[d] = Axis(x[d].rows, weight is not None)
    return tuple(x)


@rule("local_response_norm")
def response_norm(call: Call) -> Value:
    """Each channel is divided by its neighbours, so none can go."""
    x = call.axes("input")
    call.fix([x[1]], "a local response norm mixes neighbouring channels")
    return x


@rule("_weight_norm")
def weight_norm(call: Call) -> Value:
    """g · v / ‖v‖, the norm over all dimensions but one, or over all; g can make up for what v loses."""
    v, g, kept = call.axes("v"), call.axes("g"), call["dim"]
    for d, one in enumerate(v):
        if g and (d == kept or len(g[d]) == len(one)):
            call.join(one, g[d])
        elif lengthened(call.node) is None:
            call.sums(one)
    return v


def lengthened(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Of a weight norm of parameters v and g, of which only such norms of the same v read g, v and g; None elsewhere.

    ‖v‖ falls where slices of v go; g times what is left of it leaves the weights that stay as they are.
    """
    if node.op != "call_function" or operation_of(node) != "_weight_norm":
        return None
    v, g = (arguments(node)[name] for name in ("v", "g"))
    if v.op != "get_attr" or g.op != "get_attr":
        return None
    alone = all(
        user.op == "call_function" and operation_of(user) == "_weight_norm" and arguments(user)["v"] is v
        for user in g.users
    )
    return (v, g) if alone else None


@rule(
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")),
    *(f"_upsample_{kind}" for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa")),
    *("upsample_trilinear3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "replication_pad3d"),
    *("im2col_same", "grid_sampler", "grid_sampler_2d", "max_unpool2d", "max_unpool3d"),
)
def resampled(call: Call) -> Value:
    """Positions are combined within every channel."""
    x = call.axes(call.node.args[0])  # type: ignore[arg-type]
    name = call.operation
    grid = name.startswith("grid")
    places = len(x) - 2 if grid else next(int(c) for c in name if c.isdigit())
    if len(x) <= places:
        raise Unsupported(f"{name} of an input without channels")
    call.fix(x[-places:], _PLACE)
    if grid:
        call.fix(call.axes("grid"), "coordinates of positions")
    if name.startswith("max_unpool"):  # its indices count positions within a channel
        indices = call.axes("indices")
        for one, two in zip(x[:-places], indices[:-places], strict=True):
            call.join(one, two)
    made = (*x[:-places], *(call.fixed(length, _PLACE) for length in call.shape[-places:]))
    return [made, tuple(a.keeping(False) for a in made)] if isinstance(call.node.meta["val"], (tuple, list)) else made


@rule("embedding")
def embedding(call: Call) -> Value:
    """Rows are read at the values that go in and stay; features can go."""
    weight, indices = call.axes("weight"), call.axes("indices")
    call.fix([weight[0]], "an embedding is read at any of its rows")
    call.role(weight[1], "producer", "features")
    return (*indices, weight[1])


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> Value:
    """Weights are (gates · hidden, inputs) and (gates · hidden, hidden); a unit goes from all gates at once.

    A unit without weights stays at zero, whatever the gates let through, if its first state is zero.
    """
    if call.get("input") is None or call.get("batch_first") is None:
        raise Unsupported("a recurrent layer over packed sequences")
    gates = {"lstm": 4, "gru": 3}.get(call.operation, 1)
    layers, ways, per_layer = call["num_layers"], 2 if call["bidirectional"] else 1, 4 if call["has_biases"] else 2
    weights = [call.axes(node) for node in call["params"]]
    if len(weights) != layers * ways * per_layer:
        raise Unsupported("a recurrent layer with projections")
    x = call.axes("input")
    carried = x[-1]
    states: list[list[Axis]] = [[], []]
    for layer in range(layers):
        made = []
        for way in range(ways):
            first = (layer * ways + way) * per_layer
            into, again, *biases = weights[first : first + per_layer]
            _consume(call, carried, into[1])
            hidden = again[1]
            call.role(into[0], "producer", "neurons")
            call.role(into[1], "consumer", "neurons")
            for tensor in (into, again, *biases):
                call.join(call.tie(tensor[0], gates), hidden)
            made.append(hidden)
        if layer and len(made[0]) != len(states[0][0]):
            raise Unsupported("recurrent layers of different widths")
        states[0].extend(made)
        carried = concatenated(made)
    given = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
    for node in given:
        state = call.axes(node)
        call.fix(state[:-1], "the layers of a recurrent layer")
        for hidden in states[0]:
            call.join(state[-1], hidden)  # one tensor holds the states of all layers: they narrow together
        if not state[-1].zero:
            call.fix([state[-1]], "the recurrent layer starts from a state that is not zero")
    call.fix(x[:-1], "the steps of a recurrent layer")
    shapes = call.results
    output = (*(call.fixed(n, "the steps of a recurrent layer") for n in shapes[0][:-1]), carried)
    state_axes = [
        (*(call.fixed(n, "the layers of a recurrent layer") for n in shape[:-1]), states[0][0]) for shape in shapes[1:]
    ]
    return [output, *state_axes]
