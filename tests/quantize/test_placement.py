"""Where activations are rounded for each runtime, on networks small enough to say by hand."""

from __future__ import annotations

import torch
from networks import Attention, Residual, Transformer, make
from torch import Tensor, nn

from featherweight.batch import as_inputs
from featherweight.graph import foldable, graph_module
from featherweight.quantize import TARGETS
from featherweight.quantize.placement import Placement, place

ORT, OPENVINO, GENERIC = (TARGETS[name] for name in ("onnxruntime-x86", "openvino", "generic-int8"))


def placed(model: nn.Module, example: object, target: object = ORT, **settings: object) -> Placement:
    graph = graph_module(model.eval(), as_inputs(example))
    return place(graph, target, norms=foldable(graph)[0], **settings)


def test_a_residual_network_is_whole_from_its_input_to_its_classifier():
    found = placed(make(Residual), Residual.data(2))
    # Behind the batch norm and the ReLU, around the addition, and not behind the last layer.
    assert list(found.edges) == ["x", "relu", "relu_1", "two_norm", "relu_2", "relu_3", "mean"]
    assert set(found.integer) == {"stem", "one", "two", "add", "down", "mean", "head"}
    assert found.weights == {f"{name}.weight": 0 for name in ("stem", "one", "two", "down", "head")}
    assert found.left == {}
    assert found.edges["relu"].floor == 0


def test_normalisation_and_softmax_keep_their_float_inputs():
    found = placed(make(Transformer), Transformer.data(2))
    # The sum around attention is read by the next sum and a product with a weight: it is rounded for the product alone.
    assert found.edges["add"].readers == {"wide"}
    assert "add" not in found.integer
    assert found.edges["softmax"].readers == {"matmul_1"}
    assert found.edges["softmax"].ceiling == 1


def test_what_only_moves_numbers_moves_whole_ones():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.head = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Linear(36, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(torch.relu(self.conv(x))).flatten(1))

    found = placed(Net(), torch.randn(2, 3, 8, 8))
    assert list(found.edges) == ["x", "relu"]


def test_a_value_that_others_read_in_float_is_rounded_for_the_layer_alone():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y.softmax(-1)

    found = placed(Net(), torch.randn(2, 4))
    assert found.edges["a"].readers == {"b"}
    assert set(found.integer) == {"a", "b"}


def test_targets_differ_in_what_they_fuse_and_want_rounded():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.silu(self.a(x)))

    example = torch.randn(2, 3, 5, 5)
    assert list(placed(Net(), example, ORT).edges) == ["x", "a", "silu", "b"]
    assert list(placed(Net(), example, OPENVINO).edges) == ["x", "silu"]


def test_operations_between_layers_are_whole_on_every_target():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.a(x), self.b(x)], 1)
            return self.c(nn.functional.avg_pool1d(both, 2))

    for target in (ORT, OPENVINO, GENERIC):
        assert {"cat", "avg_pool1d"} <= set(placed(Net(), torch.randn(2, 3, 6), target).integer)


def test_second_operands_of_products_are_symmetric_where_the_runtime_wants_it():
    found = placed(make(Attention), Attention.data(2), OPENVINO)
    # Queries, keys and values come out of one layer.
    assert found.edges["inward"].symmetric


def test_what_padded_convolutions_read_is_marked_for_a_runtime_that_corrects_borders():
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding="same"))

    x = torch.randn(1, 3, 8, 8)
    assert [edge.padded for edge in placed(Net(), x, OPENVINO).edges.values()] == [True, False, True]
    assert not any(edge.padded for edge in placed(Net(), x, ORT).edges.values())


def test_every_softmax_is_rounded_on_a_target_without_floats():
    found = placed(make(Attention), Attention.data(2), GENERIC)
    assert "matmul" in found.edges


def test_layers_that_stay_have_their_reason():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.rnn, self.tied = nn.ConvTranspose1d(3, 4, 2), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4)
            self.own, self.embed = nn.Parameter(torch.randn(4, 4)), nn.Embedding(4, 4)
            self.tied.weight = self.embed.weight

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            y, _ = self.rnn(self.up(x).transpose(1, 2))
            return self.tied(y.mean(1) @ self.own) + self.embed(tokens)

    found = placed(Net(), (torch.randn(2, 3, 6), torch.randint(0, 4, (2,))))
    assert found.left["up"] == "onnxruntime-x86 has no integer kernel for conv_transpose1d"
    assert found.left["rnn"] == "there is no integer kernel for gru"
    assert found.left["matmul"] == "one of its operands is a tensor that the model keeps"
    assert "shared with" in found.left["tied"] or "other places too" in found.left["tied"]
    assert found.integer == ()


def test_what_is_refused_is_left():
    found = placed(make(Residual), Residual.data(2), refused=lambda name: "because" if name == "one" else None)
    assert found.left == {"one": "because"}
    assert "one.weight" not in found.weights
