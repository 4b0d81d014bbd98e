import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

from featherweight.batch import Inputs
from featherweight.cost.cost import Cost
from featherweight.cost.count import LayerCall, Profile, price, profile
from featherweight.edits import Constrain, Quantize, as_graph
from featherweight.errors import TaskError
from featherweight.forms import Grid, Rounding


def profiled(model: nn.Module, *args: Any, **kwargs: Any) -> Profile:
    return profile(model, Inputs(args, kwargs))


class Function(nn.Module):
    """A module that is only a function, with raw parameters after its inputs."""

    def __init__(self, function: Callable[..., Any], *parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for index, parameter in enumerate(parameters):
            self.register_parameter(f"p{index}", nn.Parameter(parameter))

    def forward(self, *args: Any) -> Any:
        return self.function(*args, *self.parameters())


# --- layers against formulas worked out by hand ---------------------------------------------------------------------


def products_of_convolution(x: Tensor, layer: Any) -> int:
    """Number of products, counted from the definition: a network of ones without padding sums exactly its products."""
    ones = type(layer)(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=0,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=False,
        dtype=torch.float64,
    )
    with torch.no_grad():
        ones.weight.fill_(1.0)
        around = [p for padding in reversed(layer.padding) for p in (padding, padding)]
        return int(ones(F.pad(torch.ones_like(x, dtype=torch.float64), around, value=1.0)).sum())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_convolutions_of_any_kind(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 2, 3]))
    small = st.integers(1, 3)
    inputs, outputs = groups * data.draw(small), groups * data.draw(small)
    kernel, stride, dilation = (tuple(data.draw(small) for _ in range(dims)) for _ in range(3))
    padding = tuple(data.draw(st.integers(0, 2)) for _ in range(dims))
    transposed, bias = data.draw(st.booleans()), data.draw(st.booleans())
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    if transposed:
        padding = (0,) * dims  # cuts the output, so it may leave none
    options: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": bias,
    }
    layer = kinds[dims - 1](inputs, outputs, kernel, **options)
    x = torch.ones(data.draw(st.integers(1, 2)), inputs, *[7] * dims)

    found = profiled(layer, x)
    out = layer(x)
    weights = inputs * outputs // groups * math.prod(kernel)
    assert found.total.macs == products_of_convolution(x, layer)
    assert found.total.params == weights + bias * outputs
    assert found.total.bytes == 4 * found.total.params
    assert found.total.activation_bytes == 4 * out.numel()
    # what is held, not what is used: PyTorch's transposed 3-D convolution keeps more memory than its output needs
    assert found.peak_activation_bytes == out.untyped_storage().nbytes()
    assert found.total.uncounted == ()
    (row,) = found.layers.values()
    assert row.calls == (LayerCall((tuple(x.shape),), torch.float32, tuple(out.shape)),)
    assert price(layer, row.calls) == row.cost


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
def test_linear_layers_on_any_shape(leading: list[int], inputs: int, outputs: int, bias: bool, turned: bool) -> None:
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(inputs, *leading).movedim(0, -1) if turned else torch.randn(*leading, inputs)
    row = profiled(layer, x).layers["(model)"]
    assert row.cost.macs == math.prod(leading) * inputs * outputs
    assert row.cost.params == inputs * outputs + bias * outputs
    assert price(layer, row.calls) == row.cost


@pytest.mark.parametrize("mkldnn", [True, False])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_multiply_every_matrix_once_a_step(kind: Any, gates: int, mkldnn: bool) -> None:
    steps, samples, inputs, hidden = 5, 2, 8, 6
    layer = kind(inputs, hidden, num_layers=2, bidirectional=True)
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(mkldnn)  # not torch.backends.mkldnn.flags, which warns without an Intel GPU
    try:
        found = profiled(layer, torch.randn(steps, samples, inputs))
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    weights = 2 * gates * hidden * (inputs + hidden) + 2 * gates * hidden * (2 * hidden + hidden)
    assert found.total.macs == steps * samples * weights
    assert found.total.params == weights + 2 * 2 * 2 * gates * hidden
    assert found.total.uncounted == ()
    states = (2 if kind is nn.LSTM else 1) * 2 * 2 * samples * hidden
    assert found.total.activation_bytes == 4 * (steps * samples * 2 * hidden + states)
    assert price(layer, found.layers["(model)"].calls) == found.total


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_an_lstm_with_projection_and_a_given_state() -> None:
    layer = nn.LSTM(8, 6, proj_size=3)
    state = (torch.zeros(1, 2, 3), torch.zeros(1, 2, 6))
    found = profiled(layer, torch.randn(5, 2, 8), state)
    assert found.total.macs == 5 * 2 * (24 * 8 + 24 * 3 + 3 * 6)
    assert found.layers["(model)"].calls[0].inputs == ((5, 2, 8), (1, 2, 3), (1, 2, 6))
    assert price(layer, found.layers["(model)"].calls) == found.total


def test_packed_sequences_count_the_steps_that_are_there() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 5]), batch_first=True, enforce_sorted=False)
            return self.lstm(packed)[0].data

    model = Packed()
    row = profiled(model, torch.randn(2, 5, 4)).layers["lstm"]
    assert row.cost.macs == (2 + 5) * 20 * (4 + 5)
    assert price(model.lstm, row.calls) == row.cost


def test_an_encoder_layer_is_counted_though_pytorch_would_fuse_it() -> None:
    samples, steps, width, hidden = 2, 5, 8, 16
    model = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True).eval()
    found = profiled(model, torch.randn(samples, steps, width))
    tokens = samples * steps
    attention = 4 * tokens * width * width + 2 * samples * steps * steps * width
    assert found.total.macs == attention + 2 * tokens * width * hidden
    assert found.total.params == sum(p.numel() for p in model.parameters())
    assert found.total.uncounted == found.uncalled == ()
    assert found.layers["self_attn"].kind == "MultiheadAttention (functional)"
    assert found.layers["self_attn"].cost.macs == attention
    assert found.layers["self_attn"].cost.params == 3 * width * width + 3 * width
    assert list(found.layers) == ["self_attn", "norm1", "linear1", "linear2", "norm2", "self_attn.out_proj"]


@pytest.mark.parametrize("fused", [True, False])
def test_whether_pytorch_fuses_encoder_layers_is_put_back(fused: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fused)
        profiled(nn.Linear(4, 5), torch.ones(1, 4))
        assert torch.backends.mha.get_fastpath_enabled() == fused
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_a_padded_encoder_is_counted_too() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    mask = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    found = profiled(model, torch.randn(2, 5, 8), src_key_padding_mask=mask)
    assert found.total.macs == 2 * (4 * 10 * 64 + 2 * 2 * 25 * 8 + 2 * 10 * 8 * 16)


A, B = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
PRODUCTS: dict[str, tuple[Callable[..., Any], int]] = {
    "matmul": (lambda: A @ B, 2 * 3 * 4 * 5),
    "matrix and vector": (lambda: A @ B[0, :, 0], 2 * 3 * 4),
    "mv": (lambda: A[0] @ B[0, :, 0], 3 * 4),
    "dot": (lambda: A[0, 0].dot(B[0, :, 0]), 4),
    "addmm": (lambda: torch.addmm(torch.ones(5), A[0], B[0]), 3 * 4 * 5),
    "addmm in place": (lambda: torch.ones(3, 5).addmm_(A[0], B[0]), 3 * 4 * 5),
    "addmv": (lambda: torch.addmv(torch.ones(3), A[0], B[0, :, 0]), 3 * 4),
    "baddbmm": (lambda: torch.baddbmm(torch.ones(3, 5), A, B), 2 * 3 * 4 * 5),
    "addbmm": (lambda: torch.addbmm(torch.ones(3, 5), A, B), 2 * 3 * 4 * 5),
    "addr": (lambda: torch.addr(torch.ones(3, 4), torch.ones(3), torch.ones(4)), 3 * 4),
    "einsum": (lambda: torch.einsum("bij,bjk->bik", A, B), 2 * 3 * 4 * 5),
    "tensordot": (lambda: torch.tensordot(A, B[0], 1), 2 * 3 * 4 * 5),
    "int8": (
        lambda: torch._int_mm(torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)),
        32 * 16 * 8,
    ),
    "attention": (lambda: F.scaled_dot_product_attention(A[:, None], A[:, None], A[:, None]), 2 * 2 * 3 * 3 * 4),
    "attention without heads": (lambda: F.scaled_dot_product_attention(A, A, A, is_causal=True), 2 * 2 * 3 * 3 * 4),
    "grouped attention": (
        lambda: F.scaled_dot_product_attention(
            torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8), enable_gqa=True
        ),
        2 * 4 * 3 * 5 * 8,
    ),
    "bilinear": (lambda: F.bilinear(A, A, torch.ones(7, 4, 4)), 2 * 3 * 7 * 4 * 4),
    "affine grid": (lambda: F.affine_grid(torch.ones(2, 2, 3), [2, 1, 4, 5], align_corners=False), 2 * 4 * 5 * 2 * 3),
    "time-first convolution": (
        lambda: torch.conv_tbc(torch.ones(9, 2, 4), torch.ones(3, 4, 6), torch.ones(6)),
        7 * 2 * 3 * 4 * 6,
    ),
    "vmap": (lambda: torch.vmap(torch.mm)(A, B), 2 * 3 * 4 * 5),
    "inference mode": (torch.inference_mode()(lambda: F.linear(A, B[0].T) + A @ B), 2 * 2 * 3 * 4 * 5),
    "a cell": (lambda: nn.LSTMCell(4, 5)(A[:, 0]), 2 * 20 * (4 + 5)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_kind_of_product(name: str) -> None:
    function, macs = PRODUCTS[name]
    total = profiled(Function(function)).total
    assert (total.macs, total.uncounted) == (macs, ())


def test_functional_calls_with_raw_parameters_are_a_row() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.kernel = nn.Parameter(torch.ones(3, 8)), nn.Parameter(torch.ones(4, 2, 3, 3))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.norm(F.conv2d(x, self.kernel)).flatten(2)[..., :8], self.weight)

    found = profiled(Functional(), torch.ones(1, 2, 5, 6))
    assert found.layers["(model)"].kind == "Functional (functional)"
    assert found.layers["(model)"].calls == ()
    assert found.layers["(model)"].cost.macs == 4 * 3 * 4 * 2 * 9 + 4 * 8 * 3
    assert found.layers["(model)"].cost.params == 3 * 8 + 4 * 2 * 9
    assert found.layers["norm"].cost.bytes == 4 * 4 * 4 + 8  # weight, bias, mean, variance, and an int64 counter


# --- a network as a whole -------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 10),
    )


def test_a_residual_network_agrees_with_pytorchs_counter_and_its_layers_with_their_price() -> None:
    model, x = residual(), torch.randn(2, 3, 16, 16)
    found = profiled(model, x)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    assert 2 * found.total.macs == counter.get_total_flops()
    assert found.total.params == sum(p.numel() for p in model.parameters())
    assert found.total.bytes == sum(t.nbytes for t in model.state_dict().values())
    assert list(found.layers)[:5] == ["0", "1.conv1", "1.bn1", "1.conv2", "1.bn2"]
    for name, row in found.layers.items():
        assert price(model.get_submodule(name), row.calls) == row.cost
    total = sum((row.cost for row in found.layers.values()), Cost())
    assert (total.macs, total.params, total.bytes) == (found.total.macs, found.total.params, found.total.bytes)
    assert total.activation_bytes < found.total.activation_bytes  # ReLU, additions and pooling have no row


def test_a_gpt_with_tied_weights() -> None:
    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    class Tiny(nn.Module):
        def __init__(self, words: int = 11, width: int = 8) -> None:
            super().__init__()
            self.words, self.attention = nn.Embedding(words, width), Attention(width)
            self.positions = nn.Parameter(torch.zeros(6, width))
            self.head = nn.Linear(width, words, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids) + self.positions[: ids.shape[1]]
            return self.head(x + self.attention(x))

    found = profiled(Tiny(), torch.zeros(2, 5, dtype=torch.long))
    assert found.layers["words"].cost.params == 11 * 8
    assert found.layers["head"].cost.params == found.layers["head"].cost.bytes == 0
    assert found.layers["head"].cost.macs == 10 * 8 * 11
    assert found.layers["(model)"].cost.params == 6 * 8
    assert found.layers["attention"].cost.macs == 2 * 2 * 2 * 5 * 5 * 4
    assert found.total.params == 11 * 8 + 6 * 8 + 8 * 24 + 24 + 8 * 8 + 8
    assert found.total.uncounted == ()


def test_weights_that_share_memory_under_two_names_are_stored_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert profiled(model, torch.ones(1, 4)).total == Cost(32, 16, 64, 32)


def test_a_module_called_twice_works_twice_and_is_stored_once() -> None:
    layer = nn.Linear(4, 4)
    found = profiled(
        nn.Sequential(layer, layer),
        torch.ones(3, 4),
    )
    assert list(found.layers) == ["0"]
    assert found.total == Cost(macs=2 * 3 * 16, params=20, bytes=80, activation_bytes=2 * 4 * 12)
    assert len(found.layers["0"].calls) == 2
    assert price(layer, found.layers["0"].calls) == found.total


def test_rows_follow_the_calls_and_what_is_never_called_is_named() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(4, 2), nn.Conv2d(3, 5, 3), nn.Linear(4, 4)
            self.lent = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(self.first(x), self.lent.weight))

    found = profiled(Backwards(), torch.ones(1, 4))
    assert list(found.layers) == ["(model)", "first", "last", "unused", "lent"]
    assert found.uncalled == ("unused",)
    assert found.layers["unused"].cost == Cost(params=140, bytes=560)
    assert found.layers["(model)"].cost.macs == 16
    assert found.total.params == 10 + 140 + 20 + 20


def test_bytes_are_those_of_the_stored_types() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("levels", torch.zeros(10, dtype=torch.uint8))
            self.register_buffer("scratch", torch.zeros(1000), persistent=False)
            self.layer = nn.Linear(4, 4, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    total = profiled(Mixed(), torch.ones(1, 4)).total
    assert (total.params, total.bytes, total.activation_bytes) == (20, 10 + 40, 8)


# --- compressed layers ----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    is_form = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, (3, 1), bias=False), nn.Conv2d(2, 5, (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_compressed_layer_is_one_row() -> None:
    model = nn.Sequential(Pair(), nn.ReLU())
    found = profiled(model, torch.ones(1, 3, 6, 7))
    (row,) = found.layers.values()
    assert (row.name, row.kind) == ("0", "Pair")
    assert row.cost.macs == 2 * 4 * 7 * 3 * 3 + 5 * 4 * 5 * 2 * 3
    assert row.cost.params == 2 * 3 * 3 + 5 * 2 * 3 + 5
    assert row.cost.activation_bytes == 4 * (2 * 4 * 7 + 5 * 4 * 5)
    assert row.calls == (LayerCall(((1, 3, 6, 7),), torch.float32, (1, 5, 4, 5)),)
    with torch.device("meta"):
        assert price(Pair(), row.calls) == row.cost


def test_what_a_compressed_layer_does_is_its_own_even_with_a_part_that_others_use_too() -> None:
    pair = Pair()
    found = profiled(nn.Sequential(pair.first, nn.Conv2d(2, 3, 1), pair), torch.ones(1, 3, 9, 9))
    assert found.layers["0"].cost.macs == 2 * 7 * 9 * 3 * 3
    assert found.layers["2"].cost.macs == 2 * 5 * 9 * 3 * 3 + 5 * 5 * 7 * 2 * 3


def test_a_replacement_is_priced_as_it_will_be_counted_in_the_layers_place() -> None:
    class Net(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.before, self.layer = nn.Conv2d(1, 3, 1), layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(self.before(x))[:, :3])

    x = torch.ones(2, 1, 9, 9)
    calls = profiled(Net(nn.Conv2d(3, 5, 3)), x).layers["layer"].calls
    assert price(Pair(), calls) == profiled(Net(Pair()), x).layers["layer"].cost


def test_a_parametrized_layer_is_one_row_under_its_own_class() -> None:
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(5, 4, dtype=torch.bool))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    layer = nn.Linear(4, 5)
    parametrize.register_parametrization(layer, "weight", Mask())
    found = profiled(nn.Sequential(layer), torch.ones(2, 4))
    assert [(row.name, row.kind) for row in found.layers.values()] == [("0", "Linear")]
    row = found.layers["0"]
    assert row.cost == Cost(macs=40, params=25, bytes=100 + 20, activation_bytes=80 + 40)
    assert price(layer, row.calls) == row.cost
    normed = parametrizations.weight_norm(nn.Conv1d(4, 5, 3))
    assert profiled(normed, torch.ones(1, 4, 3)).total.params == 60 + 5 + 5


def test_calls_can_be_written_by_hand() -> None:
    calls = [LayerCall(((1, 3, 8, 8),), torch.float32, (1, 5, 6, 6)), LayerCall(((2, 3, 8, 8),), torch.float32, ())]
    assert price(nn.Conv2d(3, 5, 3), calls) == profiled(nn.Conv2d(3, 5, 3), torch.ones(3, 3, 8, 8)).total


def test_pricing_does_not_touch_the_module() -> None:
    layer = nn.Linear(4, 5).train()
    price(layer, [LayerCall(((1, 4),), torch.float32, (1, 5))])
    assert layer.training
    assert not layer.weight.is_meta


# --- what cannot be counted -----------------------------------------------------------------------------------------


@torch.library.custom_op("featherweight_tests::mix", mutates_args=())
def mix(x: Tensor) -> Tensor:
    return x @ x


@mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operation_of_another_library_is_named_with_its_module() -> None:
    class Mixer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mix(x)

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Mixer()))
    found = profiled(model, torch.ones(4, 4))
    assert found.total.macs == 64
    assert found.total.uncounted == ("featherweight_tests::mix in 1.1",)
    assert found.layers["1.1"].cost.uncounted == found.total.uncounted
    assert price(model[1][1], found.layers["1.1"].calls).uncounted == ("featherweight_tests::mix in Mixer",)


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (torch.fft.rfft, "aten::_fft_r2c"),
        (torch.linalg.inv, "aten::linalg_inv_ex"),
        (lambda x: torch.cdist(x, x), "aten::_cdist_forward"),
        (lambda x: torch.sparse.mm(x.to_sparse(), x), "aten::_sparse_addmm"),
    ],
)
def test_work_without_a_formula_is_never_silently_nothing(function: Callable[..., Any], operation: str) -> None:
    assert profiled(Function(function), torch.eye(4)).total.uncounted == (f"{operation} in (model)",)


X = torch.randn(2, 4, 8, 8)
IDS = torch.tensor([[1, 2, 3]])
FREE: dict[str, tuple[nn.Module, Tensor]] = {
    **{
        name: (getattr(nn, name)(), X)
        for name in (
            *("ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "CELU", "SELU", "LeakyReLU", "PReLU", "Hardswish", "GLU"),
            *("Hardsigmoid", "Hardtanh", "Sigmoid", "Tanh", "Softplus", "Softsign", "LogSigmoid", "Softshrink"),
            *("Hardshrink", "Tanhshrink", "RReLU", "Softmax2d", "Identity", "Flatten", "Dropout", "AlphaDropout"),
        )
    },
    **{
        f"{type(layer).__name__} {index}": (layer, X)
        for index, layer in enumerate(
            (
                *(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(8), nn.RMSNorm(8)),
                *(nn.LocalResponseNorm(2), nn.InstanceNorm2d(4, track_running_stats=True), nn.MaxPool2d(2)),
                *(nn.AvgPool2d(2), nn.LPPool2d(2, 2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3)),
                *(nn.AdaptiveMaxPool2d(2), nn.FractionalMaxPool2d(2, output_ratio=0.5), nn.Upsample(scale_factor=2)),
                *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2, mode="bicubic")),
                *(nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1)),
                *(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Unfold(3), nn.Softmax(1)),
                *(nn.LogSoftmax(1), nn.ReLU(inplace=True)),
            )
        )
    },
    "Embedding": (nn.Embedding(5, 4), IDS),
    "EmbeddingBag": (nn.EmbeddingBag(5, 4, mode="mean"), IDS),
    "max_norm": (nn.Embedding(5, 4, max_norm=1.0), IDS),
    "shapes": (
        Function(
            lambda x: (
                *(x.roll(1, 1), x.flip(1), x.repeat(2, 1, 1, 1), x.tril(), x.unfold(2, 2, 1), x.chunk(2), x.clone()),
                *(x.movedim(0, 1).contiguous(), x.unflatten(3, (2, 4)), x.expand(2, 4, 8, 8), F.pad(x, (1, 1))),
                *(torch.cat([x, x]), torch.stack([x, x]), x[:, [0, 1]], x[x > 0], x[..., None], x.squeeze()),
                *(
                    F.fold(x.reshape(2, 8, 32)[:, :, :9], (4, 4), 2),
                    x.repeat_interleave(2, 1),
                    torch.block_diag(x[0, 0]),
                ),
            )
        ),
        X,
    ),
    "indexing": (
        Function(
            lambda x: (
                *(x.topk(2), x.sort(), x.argsort(), x.gather(1, x.argmax(1, True)), x.nonzero(), torch.isin(x, x)),
                *(x.masked_fill(x > 0, 0.0), torch.where(x > 0, x, -x), x.scatter(1, x.argmax(1, True), 0.0)),
                *(
                    x.index_select(1, IDS[0]),
                    x.index_add(0, IDS[0, :1], x[:1]),
                    F.one_hot(IDS),
                    x.take_along_dim(x.argsort(1), 1),
                ),
                *(torch.searchsorted(x, x), x.unique(), x.index_put((IDS[0, :1],), x[:1])),
                torch.bucketize(x, torch.ones(3)),
            )
        ),
        X,
    ),
    "arithmetic": (
        Function(
            lambda x: (
                *(1 - x, x**2, 2**x, x // 2, x % 2, -x, x.clamp(0, 1), x.lerp(x, 0.5), torch.addcmul(x, x, x), x.erf()),
                *(x.sum(), x.mean((2, 3)), x.std(), x.var(1), torch.var_mean(x), x.norm(), F.normalize(x), x.cumsum(1)),
                *(x.amax(1), x.max(), x.logsumexp(1), x.prod(), x.any(), x.isnan().any(), x.median(), x.quantile(0.5)),
                *(F.cosine_similarity(x, x), x.to(torch.bfloat16), x.int() & 1, ~x.bool(), x.sum().item(), x.diff()),
                *(
                    torch.polar(x, x).abs(),
                    torch.view_as_complex(x.unflatten(3, (4, 2))).mul(2j).real,
                    x.sin(),
                    x.exp(),
                ),
            )
        ),
        X,
    ),
    "random": (
        Function(
            lambda x: (
                *(
                    torch.randn_like(x),
                    torch.rand(2),
                    torch.normal(x, 1.0),
                    x.sigmoid().bernoulli(),
                    F.gumbel_softmax(x),
                ),
                *(torch.multinomial(x[0, 0].softmax(-1), 1), F.dropout(x, 0.5, True), torch.arange(3), torch.eye(3)),
            )
        ),
        X,
    ),
    "sampling": (Function(lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2), align_corners=False)), X),
    "losses": (
        Function(lambda x: (F.cross_entropy(x[0, 0], IDS[0, 0] + torch.zeros(8, dtype=torch.long)), F.mse_loss(x, x))),
        X,
    ),
    "simulated quantization": (
        Function(lambda x: torch.fake_quantize_per_channel_affine(x, torch.ones(2), torch.zeros(2), 0, 0, 255)),
        X,
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_ordinary_parts_of_models_have_no_products_and_leave_nothing_uncounted(name: str) -> None:
    model, x = FREE[name]
    total = profiled(model, x).total
    assert (total.macs, total.uncounted) == (0, ())


def test_a_parameterless_layer_costs_what_it_writes() -> None:
    found = profiled(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.ReLU(inplace=True)), torch.ones(2, 3, 4))
    assert found.layers == {}
    assert found.total == Cost(activation_bytes=2 * 4 * 24)
    assert found.peak_activation_bytes == 4 * 24


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_peak_of_a_chain_is_its_largest_pair_of_neighbours() -> None:
    model = nn.Sequential(
        nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 30), nn.Flatten(), nn.Linear(30, 5), nn.Linear(5, 20)
    )
    found = profiled(model, torch.ones(1, 2))
    assert found.peak_activation_bytes == 4 * (10 + 30)
    assert found.total.activation_bytes == 4 * (10 + 10 + 30 + 5 + 20)


def test_the_peak_holds_what_a_shortcut_keeps_alive() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 8), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.c(self.b(x))
            y += x
            return y

    found = profiled(Shortcut(), torch.ones(1, 2))
    assert found.peak_activation_bytes == 4 * (8 + 32 + 8)
    # When a layer ends, its inputs, its outputs and the shortcut are there; in the end the answer alone.
    assert found.held_bytes == {"a": 4 * 8, "b": 4 * (8 + 32), "c": 4 * (8 + 32 + 8), "": 4 * 8}


def test_a_view_keeps_all_of_what_it_looks_at_alive() -> None:
    def narrow(x: Tensor) -> Tensor:
        first = torch.cat([x, x, x])[:1]  # three rows stay
        return torch.cat([first, first])

    assert profiled(Function(narrow), torch.ones(1, 5)).peak_activation_bytes == 4 * 5 * (3 + 2)


# --- the caller's model ---------------------------------------------------------------------------------------------


def test_the_callers_model_stays_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("cache", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.cache = torch.cat([self.cache, x.flatten()])
            return self.norm(self.layer(x)) + torch.rand(4)

    model = Counting().train()
    model.norm.eval()
    cache, state = model.cache, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    profiled(model, torch.ones(2, 4))
    assert (model.training, model.layer.training, model.norm.training) == (True, True, False)
    assert model.cache is cache
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.nn.modules.module._has_any_global_hook()
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert torch.is_grad_enabled()
    assert model.layer.weight.requires_grad
    assert model.layer.weight.grad is None


def test_the_callers_inputs_stay_as_they_were() -> None:
    x = -torch.ones(2, 3)
    profiled(nn.ReLU(inplace=True), x)
    assert torch.equal(x, -torch.ones(2, 3))


def test_inputs_follow_the_models_type() -> None:
    found = profiled(nn.Linear(4, 5).double(), torch.ones(1, 4))
    assert found.layers["(model)"].calls[0].dtype == torch.float64
    assert found.total.activation_bytes == 8 * 5


def test_a_model_without_data_is_counted_like_one_with() -> None:
    x = torch.ones(1, 3, 16, 16)
    model = residual()
    with_data = profiled(model, x)
    without = profiled(model.to("meta"), x)
    assert (without.total, without.peak_activation_bytes) == (with_data.total, with_data.peak_activation_bytes)


def test_work_after_an_error_that_the_model_caught_is_booked_where_it_belongs() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong, self.right = nn.Linear(7, 7), nn.Linear(4, 5)
            self.weight = nn.Parameter(torch.ones(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.wrong(x)
            except RuntimeError:
                x = self.right(x)
            return F.linear(x, self.weight)

    found = profiled(nn.Sequential(Careful()), torch.ones(1, 4))
    assert {name: row.cost.macs for name, row in found.layers.items()} == {"0": 15, "0.wrong": 0, "0.right": 20}


@pytest.mark.parametrize("tokens", [16, 32])
def test_in_a_graph_products_are_the_layers_whose_weight_is_multiplied_by(tokens: int) -> None:
    """And no others': tensors come and go at the addresses of weights that a grid has made."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 4)
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))

    given = Inputs((torch.randn(1, tokens, 32),), {})
    graph = as_graph(Net().eval(), given)
    for layer, tensor in (("first", "weight"), ("attention", "in_proj_weight"), ("attention.out_proj", "weight")):
        Constrain(layer, Grid(8, axis=0, tensor=tensor)).apply(graph)
    Quantize({"first": (Rounding(8), None), "attention.softmax": (Rounding(8), None)}).apply(graph)
    found = profile(graph, given).layers
    assert {name: row.cost.macs for name, row in found.items() if row.cost.macs} == {
        "first": tokens * 32 * 32,
        "attention": tokens * 32 * 96,
        "attention.out_proj": tokens * 32 * 32,
        "(model)": 2 * tokens * tokens * 32,  # of two activations
        "last": 32 * 4,
    }


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_model_that_fails_on_the_example_says_on_which_and_why() -> None:
    model = nn.Sequential(nn.Linear(4, 5)).train()
    with pytest.raises(
        TaskError, match=r"Sequential fails on the example \(float32\[1, 3\]\): mat1 and mat2 .*1x3 and 4x5.*Check"
    ):
        profiled(model, torch.ones(1, 3))
    assert model.training
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_model_that_has_yet_to_make_its_parameters_is_refused() -> None:
    with pytest.raises(TaskError, match=r"parameters without a shape yet \(0.weight, 0.bias\): call it once"):
        profiled(nn.Sequential(nn.LazyLinear(4)), torch.ones(1, 3))


def test_a_module_that_does_not_fit_the_place_has_no_price() -> None:
    with pytest.raises(TaskError, match=r"Linear cannot be priced on inputs of shapes \[\(1, 3\)\]: .*fits the place"):
        price(nn.Linear(4, 5), [LayerCall(((1, 3),), torch.float32, (1, 5))])
