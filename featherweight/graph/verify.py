"""A narrowed network held against the original with the same slices set to zero.

For almost every operation, a slice that is zero counts for nothing, so that setting it to zero and removing it are
the same. Of `RESTRICTED` this does not hold; there the reference takes statistics over what was kept, as the narrowed
network does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from featherweight import batch
from featherweight.batch import Inputs
from featherweight.graph.coupling import Coupling
from featherweight.graph.rewrite import Mask
from featherweight.graph.rules import Axes, operation_of
from featherweight.graph.rules.call import arguments
from featherweight.graph.rules.layers import lengthened
from featherweight.graph.rules.reduction import along, statistic
from featherweight.graph.trace import attribute, module_of, quiet, source_of

# Operations for which masking is not removal. Norms take statistics over what was kept, and so do means if they are of
# a norm written out; of a weight norm a removed row is 0, not 0 / 0, and those that stay are as they were.
RESTRICTED = ("layer_norm", "rms_norm", "group_norm", "mean", "_weight_norm")

_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}


class Masked(fx.Interpreter):
    """The original's graph, run with the removed slices of its parameters set to zero.

    Args:
        coupling: the graph and its labels.
        lost: by label, whether it goes.
        double: whether to compute in float64, whatever the model's type.
    """

    def __init__(self, coupling: Coupling, lost: Mask, *, double: bool) -> None:
        super().__init__(coupling.analysis.trace.graph, garbage_collect_values=True)
        self._coupling, self._lost, self._double = coupling, lost, double
        self._masked: dict[str, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor, with removed slices of zeros."""
        value = super().get_attr(target, args, kwargs)
        name = self._coupling.analysis.trace.names.get(target)
        if name is None:
            return value
        if name not in self._masked:
            value = value.detach()
            wide = torch.float64 if value.is_floating_point() else widened(value.dtype)
            value = value.to(wide if self._double else value.dtype, copy=True)  # the tensor is the model's own
            if value.is_floating_point() or value.is_complex():
                for d, axis in enumerate(self._coupling.analysis.tensors.get(name, ())):
                    gone = torch.from_numpy(~self._coupling.stays(axis.rows, self._lost))
                    if gone.any():
                        value.index_fill_(d, gone.nonzero().reshape(-1).to(value.device), 0)
            self._masked[name] = value
        return self._masked[name]

    def run_node(self, n: fx.Node) -> Any:
        """One operation, with those of `RESTRICTED` as the narrowed network computes them."""
        if n.op != "call_function" or operation_of(n) not in RESTRICTED:
            if n.op == "call_function" and operation_of(n) == "_assert_tensor_metadata":
                return None
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if self._double:
            args, kwargs = widened((args, kwargs))
        if operation_of(n) == "_weight_norm":
            return self._normed_weight(n, args, kwargs)
        return self._over_kept(n, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operation, in float64 where asked."""
        if self._double:
            args, kwargs = widened((args, kwargs))
        return super().call_function(target, args, kwargs)

    def _normed_weight(self, node: fx.Node, args: Any, kwargs: Any) -> Tensor:
        """A weight of a direction and a length, the original's with zeros where slices went."""
        if lengthened(node) is None:
            return torch.nan_to_num(node.target(*args, **kwargs), nan=0.0)  # type: ignore[operator]
        whole = [attribute(self.module, str(read.target)).detach().to(args[0].dtype) for read in node.args[:2]]  # type: ignore[union-attr]
        made: Tensor = node.target(*whole, *args[2:], **kwargs)  # type: ignore[operator]
        for d, axis in enumerate(cast(Axes, self._coupling.analysis.values[node])):
            gone = torch.from_numpy(~self._coupling.stays(axis.rows, self._lost)).nonzero().reshape(-1)
            made = made.index_fill(d, gone.to(made.device), 0)
        return made

    def _over_kept(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A norm over what was kept, with zeros where slices went."""
        operation, x = operation_of(node), args[0]
        dims, kept = _normed(self._coupling, node, self._lost)
        if not kept:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        narrow = {d: torch.from_numpy(stays).nonzero().reshape(-1) for d, stays in kept.items()}
        rest = list(args[1:])
        for d, indices in narrow.items():
            x = x.index_select(d, indices)
            for i, other in enumerate(rest):
                if isinstance(other, Tensor):  # scale and shift, whose dimensions are the last ones, or the channels
                    rest[i] = other.index_select(0 if operation == "group_norm" else d - dims[0], indices)
        if operation in ("layer_norm", "rms_norm"):
            rest[0] = list(x.shape[dims[0] :])
        made = node.target(x, *rest, **kwargs)  # type: ignore[operator]
        if operation == "mean":
            return made
        for d, indices in reversed(narrow.items()):
            shape = list(made.shape)
            shape[d] = args[0].shape[d]
            made = made.new_zeros(shape).index_copy(d, indices, made)
        return made


def widened(value: Any) -> Any:
    """float32 and narrower types in an operation's arguments as float64, complex ones as complex128."""
    return pytree.tree_map(lambda leaf: _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf, value)


def answers(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every floating-point tensor in a module's answer; of complex ones both parts, in a last dimension."""
    with torch.no_grad(), batch.plain_attention():
        return _real(batch.tensors_in(inputs.into(module)))


def _real(tensors: Iterable[Tensor]) -> list[Tensor]:
    parts = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors)
    return [t for t in parts if t.is_floating_point()]


def masked_answers(coupling: Coupling, lost: Mask, inputs: Inputs, *, double: bool) -> list[Tensor]:
    """What the original answers with the lost slices set to zero."""
    graph = coupling.analysis.trace.graph
    flat = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))  # in the order that the graph was captured with
    with torch.no_grad(), batch.plain_attention():
        made = Masked(coupling, lost, double=double).run(*flat, enable_io_processing=False)
    made = graph.graph._codegen.process_outputs(made)
    return _real(batch.tensors_in(made))


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two answers, relative to the second's largest value; infinite if shapes differ."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if not a.numel():
            continue
        a, b = a.detach().double(), b.detach().double()
        difference = torch.where(a == b, 0.0, (a - b).abs())  # the same infinity is no difference
        error = float(difference.max() / (b.nan_to_num(0, 0, 0).abs().max() + 1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def random_like(inputs: Inputs, seed: int, *, dynamic: bool, double: bool) -> Inputs:
    """Random inputs of the example's shapes; where the batch may have any size, of two samples more."""
    generator = torch.Generator().manual_seed(seed)
    samples = inputs.batch_size

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if dynamic and value.ndim and value.shape[0] == samples:
            value = torch.cat([value, value[:1], value[:1]])
        if value.is_floating_point():
            made = torch.randn(value.shape, generator=generator).to(value.device)
            return made.double() if double else made.to(value.dtype)
        if value.is_complex():
            made = torch.randn(value.shape, generator=generator, dtype=torch.complex128).to(value.device)
            return made if double else made.to(value.dtype)
        if value.dtype == torch.bool or not value.numel():
            return value
        low, high = int(value.min()), int(value.max())
        return torch.randint(low, high + 1, value.shape, generator=generator).to(value)

    args, kwargs = pytree.tree_map(drawn, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def in_double(module: nn.Module) -> nn.Module:
    """A copy of a module in float64; of a captured graph, the types written in it too."""
    with quiet():
        made = batch.copied(module).double()
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data = tensor.data.to(widened(tensor.dtype))  # the complex ones, which `double` leaves alone
    if isinstance(made, fx.GraphModule):
        for node in made.graph.nodes:
            node.args, node.kwargs = widened((node.args, node.kwargs))
        made.recompile()
    return made


def norms_over_kept(coupling: Coupling, kept: Mapping[str, Sequence[int]]) -> list[str]:
    """Where norms take their statistics over fewer slices than before: modules, or lines of the user's code.

    Args:
        coupling: of the network.
        kept: by group name, the units that stay.
    """
    lost, nodes = coupling.lost(kept), coupling.analysis.trace.graph.graph.nodes
    found = [n for n in nodes if n.op == "call_function" and _normed(coupling, n, lost)[1]]
    return list(dict.fromkeys(module_of(node) or source_of(node) for node in found))


def _normed(coupling: Coupling, node: fx.Node, lost: Mask) -> tuple[list[int], dict[int, Mask]]:
    """The dimensions that a norm takes statistics over; of those that lose slices, which indices stay."""
    operation, x = operation_of(node), node.args[0] if node.args else None
    axes = coupling.analysis.values.get(x) if isinstance(x, fx.Node) else None
    if not isinstance(axes, tuple):
        return [], {}
    if operation == "group_norm":
        dims = [1]
    elif operation in ("layer_norm", "rms_norm"):
        dims = list(range(len(axes) - len(arguments(node)["normalized_shape"]), len(axes)))
    elif operation == "mean" and statistic(node):
        dims = sorted(along(node))
    else:
        return [], {}
    kept = {d: coupling.stays(axes[d].rows, lost) for d in dims}
    return dims, {d: stays for d, stays in kept.items() if not stays.all()}
