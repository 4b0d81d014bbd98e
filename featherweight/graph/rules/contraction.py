"""Products that sum over a shared dimension: linear layers, matrix products, einsum, attention."""

from __future__ import annotations

from torch import fx

from featherweight.graph.rules.call import Axes, Axis, Call, Unsupported, Value, rule


@rule("linear")
def linear(call: Call) -> Value:
    """Inputs meet the weight's columns, a bias its rows: (..., inputs) → (..., outputs)."""
    x, weight, bias = call.axes("input"), call.axes("weight"), call.given("bias")
    if len(weight) != 2:
        raise Unsupported("linear with a vector for a weight")
    contract(call, x[-1], weight[1])
    made = weight[0]
    if bias is not None:
        call.join(made, bias[0])
        made = made.keeping(bias[0].zero)
    call.role(weight[0], "producer", "neurons")
    call.role(weight[1], "consumer", "neurons")
    return (*x[:-1], made)


@rule("matmul", "mm", "bmm")
def matmul(call: Call) -> Value:
    """A product of matrices, stacks of them or vectors: the inner dimensions meet."""
    other = "other" if call.operation == "matmul" else "mat2"
    return _product(call, call.axes("self"), call.axes(other), call[other])


@rule("addmm", "baddbmm")
def added_product(call: Call) -> Value:
    """A product of matrices with something added: what is added meets the outer dimensions."""
    names = ("mat1", "mat2") if call.operation == "addmm" else ("batch1", "batch2")
    product = _product(call, call.axes(names[0]), call.axes(names[1]), call[names[1]])
    aligned = call.broadcast([product, call.axes("self")])
    return tuple(
        axis.keeping(here[1] is not None and here[1].zero) for axis, here in zip(product, aligned, strict=True)
    )


@rule("mv")
def matrix_vector(call: Call) -> Value:
    """(rows, columns) and (columns,) → (rows,)."""
    matrix, vector = call.axes("self"), call.axes("vec")
    contract(call, matrix[1], vector[0])
    return (matrix[0],)


@rule("dot", "vdot")
def dot(call: Call) -> Value:
    """Two vectors meet and are gone."""
    contract(call, call.axes("self")[0], call.axes("other" if call.operation == "vdot" else "tensor")[0])
    return ()


@rule("outer")
def outer(call: Call) -> Value:
    """(rows,) and (columns,) → (rows, columns): nothing meets."""
    return (*call.axes("self"), *call.axes("vec2"))


@rule("einsum")
def einsum(call: Call) -> Value:
    """Dimensions of one letter meet; a letter that the answer lacks is summed over."""
    equation = call["equation"].replace(" ", "")
    if "." in equation:
        raise Unsupported("einsum with an ellipsis")
    inputs, arrow, output = equation.partition("->")
    letters = inputs.split(",")
    if not arrow:
        every = inputs.replace(",", "")
        output = "".join(sorted(c for c in set(every) if every.count(c) == 1))
    met: dict[str, Axis] = {}
    zero: dict[str, bool] = {}
    for operand, term in zip(call["tensors"], letters, strict=True):
        if len(set(term)) != len(term):
            raise Unsupported("einsum over a diagonal")
        for letter, axis in zip(term, call.axes(operand), strict=True):
            if letter in met and len(met[letter]) != len(axis):
                raise Unsupported("einsum that stretches a dimension")
            met[letter] = call.join(met[letter], axis) if letter in met else axis
            zero[letter] = zero.get(letter, False) or axis.zero
    for operand, term in zip(call["tensors"], letters, strict=True):
        if call.constant(operand) is not None:
            for letter, axis in zip(term, call.axes(operand), strict=True):
                if letter not in output:
                    call.role(axis, "consumer", "neurons")
                elif inputs.count(letter) == 1:
                    call.role(axis, "producer", "neurons")
    for letter, axis in met.items():
        if letter not in output:
            call.sums(axis)
            if not zero[letter]:
                call.fix([axis], "a sum over slices that are not zero where their weights are")
    return tuple(Axis(met[letter].rows, zero[letter]) for letter in output)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Value:
    """(..., heads, tokens, dims): queries and keys share dims, keys and values tokens, all three heads."""
    q, k, v = call.axes("query"), call.axes("key"), call.axes("value")
    if not len(q) == len(k) == len(v) or len(q) < 2:
        raise Unsupported("attention over tensors of different numbers of dimensions")
    contract(call, q[-1], k[-1])
    call.fix([call.join(k[-2], v[-2])], "attention weighs along it")
    call.fix([q[-2]], "attention weighs along it")
    lead: list[Axis] = []
    for d in range(len(q) - 2):
        one, two, three = q[d], k[d], v[d]
        if len(one) == len(two) == len(three):
            call.join(one, two)
            call.join(two, three)
        elif call.get("enable_gqa") and d == len(q) - 3 and len(two) == len(three) and len(one) % len(two) == 0:
            call.join(two, three)
            outer_, _ = call.split(one, len(two), len(one) // len(two))
            call.join(outer_, two)
        else:
            call.fix([one, two, three], "attention stretches it")
        lead.append(Axis(one.rows, three.zero))
    if len(q) > 2:
        call.role(q[-3], "heads", "heads")
    call.role(q[-1], "head dims", "head dims")
    call.role(v[-1], "head dims", "head dims")
    mask = call.given("attn_mask")
    if mask is not None:
        call.broadcast([(*lead, q[-2], k[-2]), mask], [*(len(a) for a in lead), len(q[-2]), len(k[-2])])
    return (*lead, q[-2], v[-1])


def contract(call: Call, one: Axis, other: Axis) -> None:
    """Sum over two dimensions that meet: right without the removed slices only if one of the two is zero there."""
    if len(one) != len(other):
        raise Unsupported(f"lengths {len(one)} and {len(other)} meet")
    call.join(one, other)
    call.sums(one)
    if not one.zero and not other.zero:
        call.fix([one], "a sum over slices that are not zero where their weights are")


def _product(call: Call, x: Axes, y: Axes, weight: object) -> Axes:
    if len(x) == 1 or len(y) == 1:
        if len(x) == len(y) == 1:
            contract(call, x[0], y[0])
            return ()
        if len(y) == 1:
            contract(call, x[-1], y[0])
            return x[:-1]
        contract(call, x[0], y[-2])
        return (*y[:-2], y[-1])
    contract(call, x[-1], y[-2])
    if len(y) == 2 or (isinstance(weight, fx.Node) and call.constant(weight) is not None):
        call.role(y[-2], "consumer", "neurons")
        call.role(y[-1], "producer", "neurons")
    lead = call.broadcast([x[:-2], y[:-2]], call.shape[:-2])
    made = []
    for d, here in enumerate(lead):
        present = [axis for axis in here if axis is not None]
        zero = any(axis.zero for axis in present)
        made.append(Axis(present[0].rows, zero) if present else call.fixed(call.shape[d]))
    return (*made, x[-2], y[-1])
