"""What PyTorch's operations multiply and accumulate: a formula, nothing by convention, or not known.

Only matrix-like products have multiply-accumulates: matrix products, convolutions, attention, recurrent layers and
bilinear forms. Element-wise operations, normalizations, pooling, softmax, resampling, look-ups, reductions and copies
have none, as is customary where networks are compared. Attention counts its whole score matrix, masked or not;
a convolution counts the products with its zero padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., int]


def macs(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int | None:
    """Multiply-accumulates of one call of an ATen (or other) operation; None where they are not known."""
    if formula := formula_of(operation):
        return formula(*args, out=out, **kwargs)
    return 0 if is_free(operation) else None


@cache
def name_of(operation: Any) -> str:
    """The operation's name with its library, such as ``aten::convolution``."""
    return operation._schema.name if hasattr(operation, "_schema") else str(operation)


@cache
def formula_of(operation: Any) -> Formula | None:
    """Multiply-accumulates out of the operation's arguments and its result `out`; None where no formula is known."""
    name = name_of(operation).removesuffix("_")
    if name in _FORMULAS:
        return _FORMULAS[name]
    if (flops := flop_registry.get(getattr(operation, "overloadpacket", operation))) is not None:
        return lambda *args, out, **kwargs: int(flops(*args, **kwargs, out_val=out)) // 2  # two FLOPs make a MAC
    return None


@cache
def is_free(operation: Any) -> bool:
    """Whether the operation is known to do no matrix-like product."""
    if not hasattr(operation, "_schema"):
        return False
    schema, name = operation._schema, name_of(operation).removeprefix("aten::")
    if torch.Tag.pointwise in operation.tags or returns_views(operation):
        return True
    if not any("Tensor" in str(argument.type) for argument in schema.arguments):
        return True  # makes a tensor out of numbers, or none at all
    plain = name.removesuffix("_")
    return plain in _FREE or plain.removesuffix("_copy") in _FREE or plain.startswith(_FREE_FAMILIES)


@cache
def has_parts(operation: Any) -> bool:
    """Whether the operation itself is not known, but PyTorch can take it apart into others."""
    return (
        formula_of(operation) is None
        and not is_free(operation)
        and hasattr(operation, "_schema")
        and operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    )


@cache
def is_in_place(operation: Any) -> bool:
    """Whether the operation writes into its arguments."""
    return hasattr(operation, "_schema") and operation._schema.is_mutable


@cache
def returns_views(operation: Any) -> bool:
    """Whether all that the operation returns are views of its arguments, by its schema."""
    returns = operation._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@cache
def writes_nothing(operation: Any) -> bool:
    """Whether the operation only allocates memory, or only looks at it in another shape."""
    if not hasattr(operation, "_schema"):
        return False
    name = name_of(operation).removeprefix("aten::")
    return (
        torch.Tag.inplace_view in operation.tags or returns_views(operation) or name.startswith(("empty", "new_empty"))
    )


def results(operation: Any, out: Any) -> Any:
    """What the operation returns, less the statistics that some return for a backward pass."""
    with_statistics = name_of(operation).removeprefix("aten::").startswith(_WITH_STATISTICS)
    return out[0] if with_statistics and isinstance(out, tuple | list) else out


def _product(left: Tensor, right: Tensor, *_: Any, out: Tensor, **__: Any) -> int:
    """Every output sums over the left factor's last dimension."""
    return out.numel() * left.shape[-1]


def _added_product(_base: Tensor, left: Tensor, *_: Any, out: Tensor, **__: Any) -> int:
    return out.numel() * left.shape[-1]


def _summed_products(_base: Tensor, left: Tensor, right: Tensor, **_: Any) -> int:
    return left.numel() * right.shape[-1]


def _grouped_product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """(rows, shared) and (shared, columns), of which at most one is stacked where the groups split a dimension."""
    groups = left.shape[0] if left.ndim == right.ndim == 3 else 1
    return groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


def _convolution(
    x: Tensor,
    weight: Tensor,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    *_: Any,
    out: Tensor,
) -> int:
    """Every output channel's kernel at every output; transposed, every input channel's kernel at every input."""
    return (x if transposed else out).numel() * prod(weight.shape[1:])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their product with the values. Shapes (..., queries, width) and (..., keys, width)."""
    return prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(x: Tensor, weights: Sequence[Tensor]) -> int:
    """Every matrix once a step; x is (steps, batch, inputs), in any order, or packed (steps of all samples, inputs)."""
    return x.numel() // x.shape[-1] * sum(w.numel() for w in weights if w.ndim == 2)


def _trilinear(a: Tensor, b: Tensor, c: Tensor, expand_a: Any, expand_b: Any, expand_c: Any, *_: Any, **__: Any) -> int:
    """One a term of Σ a·b·c, so that nn.Bilinear has as many a sample as it has weights."""
    shapes = []
    for tensor, expanded in ((a, expand_a), (b, expand_b), (c, expand_c)):
        shape = list(tensor.shape)
        for dimension in expanded:
            shape.insert(dimension, 1)
        shapes.append(shape)
    return prod(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


_FORMULAS: dict[str, Formula] = {
    **{f"aten::{name}": _product for name in ("mm", "bmm", "mv", "dot", "vdot", "linear", "_int_mm", "_scaled_mm")},
    **{
        f"aten::{name}": _product
        for name in ("_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu")
    },
    **{f"aten::{name}": _added_product for name in ("addmm", "baddbmm", "addmv", "_addmm_activation")},
    "aten::_grouped_mm": _grouped_product,
    "aten::addbmm": _summed_products,
    "aten::addr": lambda *_, out, **__: out.numel(),
    "aten::affine_grid_generator": lambda theta, *_, out, **__: out.numel() * theta.shape[-1],
    **{f"aten::{name}": _convolution for name in ("convolution", "_convolution", "convolution_overrideable")},
    **{
        f"aten::_scaled_dot_product_{kernel}": _attention
        for kernel in (
            "flash_attention",
            "flash_attention_for_cpu",
            "efficient_attention",
            "cudnn_attention",
            "attention_math_for_mps",
            "fused_attention_overrideable",
        )
    },
    "aten::mkldnn_rnn_layer": lambda x, input_weight, hidden_weight, *_, **__: _recurrent(
        x, [input_weight, hidden_weight]
    ),
    "aten::_cudnn_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "aten::miopen_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "aten::_trilinear": _trilinear,
    "aten::conv_tbc": lambda x, weight, *_, out, **__: out.numel() * prod(weight.shape[:2]),
    "torchvision::deform_conv2d": lambda x, weight, *_, out, **__: out.numel() * prod(weight.shape[1:]),
}

_WITH_STATISTICS = (
    *("native_", "_native_", "_batch_norm_", "cudnn_batch_norm", "miopen_batch_norm", "_fused_rms_norm"),
    *("_scaled_dot_product_", "_embedding_bag"),
)

_FREE_FAMILIES = ("upsample_", "_upsample_", "new_", "fake_quantize_", "_fake_quantize_", "quantized_decomposed::")

# Free operations without the "_" of in-place and the "_copy" of copying variants.
_COPIES = """
    alias as_strided as_strided_scatter block_diag bucketize cat channel_shuffle clone col2im constant_pad_nd
    contiguous copy detach diag_embed diagonal diagonal_scatter embedding _embedding_bag _embedding_bag_forward_only
    embedding_renorm expand flip gather im2col index index_add index_copy index_fill index_put _index_put_impl
    index_reduce index_select isin _lazy_clone lift lift_fresh masked_fill masked_scatter masked_select narrow
    native_channel_shuffle nonzero nonzero_static _pack_padded_sequence permute pixel_shuffle pixel_unshuffle put
    reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d reshape resize resize_as roll rot90 scatter scatter_add scatter_reduce searchsorted select
    select_scatter set slice slice_scatter split split_with_sizes squeeze _stack stack swapaxes swapdims t take
    _to_copy _to_sparse transpose tril triu unbind unfold _unsafe_index _unsafe_index_put _unsafe_masked_index
    unsafe_split unsafe_split_with_sizes _unsafe_view unsqueeze view where
"""
_ELEMENTWISE = """
    add _add_relu angle bitwise_and bitwise_or bitwise_xor clip complex _conj_physical copysign dequantize div eq
    fill floor_divide _fused_moving_avg_obs_fq_helper ge glu gt hardswish int_repr isfinite isinf isnan ldexp le
    linalg_cross log_sigmoid_forward lt mul ne neg polar pow prelu _prelu_kernel quantize_per_channel
    quantize_per_tensor quantize_per_tensor_dynamic relu remainder rrelu_with_noise rsub sub _thnn_fused_gru_cell
    _thnn_fused_lstm_cell threshold true_divide zero
"""  # where PyTorch does not tag them pointwise
_RANDOM = """
    bernoulli binomial cauchy dropout empty_like exponential full_like _fused_dropout geometric log_normal
    multinomial native_dropout normal normal_functional ones_like poisson rand_like randint_like randn_like random
    uniform zeros_like
"""
_REDUCTIONS = """
    all amax amin aminmax _aminmax any argmax argmin argsort bincount count_nonzero cummax _cummax_helper cummin
    _cummin_helper cumprod cumsum dist equal histc kthvalue linalg_vector_norm _log_softmax _logcumsumexp
    logcumsumexp logsumexp _masked_softmax max mean median min mode nanmedian nansum norm prod renorm _safe_softmax
    segment_reduce _softmax sort std std_mean sum topk trace _unique _unique2 unique_consecutive unique_dim
    unique_dim_consecutive var var_mean
"""
_LAYERS = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d avg_pool3d
    batch_norm_elemt _batch_norm_no_update cudnn_batch_norm cudnn_grid_sampler fractional_max_pool2d
    fractional_max_pool3d _fused_rms_norm grid_sampler_2d grid_sampler_3d max_pool2d_with_indices
    max_pool3d_with_indices max_unpool2d max_unpool3d miopen_batch_norm native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training native_group_norm native_layer_norm native_norm _weight_norm_interface
"""
_LOSSES = """
    binary_cross_entropy binary_cross_entropy_with_logits huber_loss mse_loss nll_loss2d_forward nll_loss_forward
    smooth_l1_loss soft_margin_loss
"""
_QUESTIONS = """
    _assert_async _assert_scalar _assert_tensor_metadata _is_all_true _is_any_true is_nonzero is_same_size
    _linalg_check_errors _local_scalar_dense _nested_tensor_size prim::device q_scale q_zero_point sym_numel
    sym_size sym_storage_offset sym_stride
"""
_TORCHVISION = """
    torchvision::nms torchvision::ps_roi_align torchvision::ps_roi_pool torchvision::roi_align torchvision::roi_pool
"""
_FREE = frozenset(
    " ".join((_COPIES, _ELEMENTWISE, _RANDOM, _REDUCTIONS, _LAYERS, _LOSSES, _QUESTIONS, _TORCHVISION)).split()
)
