"""Operations that only run on other hardware, by their formulas alone."""

import torch

from featherweight.cost.operations import macs

aten = torch.ops.aten


def test_cudnns_recurrent_layer_counts_its_matrices_and_not_its_biases() -> None:
    x = torch.empty(5, 2, 8)
    weights = [torch.empty(24, 8), torch.empty(24, 6), torch.empty(24), torch.empty(24)]
    assert macs(aten._cudnn_rnn.default, (x, weights, 4), {}, ()) == 5 * 2 * 24 * (8 + 6)


def test_attention_kernels_of_other_devices() -> None:
    query, key, value = torch.empty(2, 4, 3, 8), torch.empty(2, 4, 7, 8), torch.empty(2, 4, 7, 6)
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "attention_math_for_mps"):
        operation = getattr(aten, f"_scaled_dot_product_{kernel}").default
        assert macs(operation, (query, key, value), {}, None) == 2 * 4 * 3 * 7 * (8 + 6)


def test_grouped_products_of_mixtures_of_experts() -> None:
    rows, experts = torch.empty(10, 4), torch.empty(3, 4, 5)
    assert macs(aten._grouped_mm.default, (rows, experts), {}, None) == 10 * 4 * 5  # each row meets one expert
    assert macs(aten._grouped_mm.default, (torch.empty(3, 10, 4), experts), {}, None) == 3 * 10 * 4 * 5
    assert macs(aten._grouped_mm.default, (torch.empty(4, 9), torch.empty(9, 5)), {}, None) == 4 * 9 * 5


def test_weights_in_eight_bits() -> None:
    args = (torch.empty(3, 4), torch.empty(5, 4, dtype=torch.int8), torch.empty(5))
    assert macs(aten._weight_int8pack_mm.default, args, {}, torch.empty(3, 5)) == 3 * 4 * 5


def test_pytorchs_own_formulas_serve_where_there_is_none_of_ours() -> None:
    # the gradients of a convolution: one product each for the input and for the weight
    x, weight, gradient = torch.empty(1, 2, 8), torch.empty(3, 2, 3), torch.empty(1, 3, 6)
    args = (gradient, x, weight, [3], [1], [0], [1], False, [0], 1, [True, True, False])
    out = (torch.empty_like(x), torch.empty_like(weight), None)
    assert macs(aten.convolution_backward.default, args, {}, out) == 2 * (3 * 6 * 2 * 3)


def test_what_is_not_known_is_not_nothing() -> None:
    x = torch.empty(3, 3)
    assert macs(aten.linalg_inv_ex.default, (x,), {}, (x, x)) is None
    assert macs(aten.add_.Tensor, (x, x), {}, x) == 0
    assert macs(aten.expand_copy.default, (x, [3, 3]), {}, x) == 0
