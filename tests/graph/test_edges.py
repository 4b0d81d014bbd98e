"""Values of a graph by name, modules put onto its edges, and batch norms folded into layers."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Residual, Transformer, make
from torch import Tensor, nn

from featherweight.batch import as_inputs
from featherweight.edits import Capture, Constrain, Fold, as_graph
from featherweight.errors import EditError
from featherweight.forms import Grid
from featherweight.graph import GraphError, ModelGraph, fold, foldable, graph_module, put_on_edges, value_names


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def graph_of(kind: type[nn.Module]) -> tuple[nn.Module, ModelGraph]:
    model = make(kind)
    return model, graph_module(copy.deepcopy(model), as_inputs(kind.data(2)))


def test_values_are_named_after_layers_operations_and_inputs():
    _, graph = graph_of(Residual)
    names = list(value_names(graph).values())
    assert names[:4] == ["x", "stem", "stem_norm", "relu"]
    assert {"add", "relu_2", "down", "mean", "head"} <= set(names)
    assert len(set(names)) == len(names)


def test_attention_is_spelled_out_and_answers_as_before():
    class Net(nn.Module):
        def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
            first = nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=0.3)
            return nn.functional.scaled_dot_product_attention(first, k, k, attn_mask=mask > 0)

    mask = torch.randn(2, 1, 4, 5)
    mask[..., 0] = mask[..., 0].abs() + 0.1  # a query that may look at nothing has no answer to compare
    given = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), mask
    graph = graph_module(Net().eval(), as_inputs(given))
    assert "scaled_dot_product_attention" not in set(value_names(graph).values())
    assert {"matmul", "softmax", "matmul_1"} <= set(value_names(graph).values())
    torch.testing.assert_close(graph(*given), Net()(*given))


def test_only_the_named_readers_read_what_a_module_makes():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            return y.sin() + y.cos()

    graph = graph_module(Net().eval(), as_inputs(torch.randn(3, 2)))
    put_on_edges(graph, {"add": ["sin"]}, lambda name: Doubled())
    x = torch.randn(5, 2)
    torch.testing.assert_close(graph(x), (2 * (x + 1)).sin() + (x + 1).cos())
    with pytest.raises(GraphError, match="add is quantized already"):
        put_on_edges(graph, {"add": ["cos"]}, lambda name: Doubled())


@pytest.mark.parametrize(
    ("edges", "message"),
    [({"ad": None}, "has no value 'ad'; did you mean 'add'"), ({"x": ["sin"]}, "x is not read by sin")],
)
def test_edges_that_are_not_there_are_refused(edges, message):
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).sin()

    graph = graph_module(Net().eval(), as_inputs(torch.randn(3, 2)))
    with pytest.raises(GraphError, match=message):
        put_on_edges(graph, edges, lambda name: Doubled())


class Normed(nn.Module):
    """Layers of every kind with a batch norm behind them, one of them with no layer in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 8, 3, groups=2)
        self.norm2 = nn.BatchNorm2d(8, affine=False)
        self.alone = nn.BatchNorm2d(8)
        self.flat = nn.Linear(8, 5, bias=False)
        self.norm3 = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.up(torch.relu(self.norm1(self.conv1(x)))))
        return self.norm3(self.flat(torch.relu(self.alone(x.sin())).mean((2, 3))))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 4, 7, 7, generator=torch.Generator().manual_seed(1))


def test_folding_is_exact_for_every_kind_of_layer():
    torch.manual_seed(0)
    model = Normed().double()
    for _ in range(3):  # so that the statistics are not 0 and 1
        model(3 * Normed.data(8).double() + 1)
    model.eval()
    model.norm1.weight.data[1] = 0  # a channel that the norm switches off
    graph = graph_module(copy.deepcopy(model), as_inputs(Normed.data(2).double()))
    able, left = foldable(graph)
    assert (able, list(left)) == (["norm1", "norm2.batch_norm", "norm3"], ["alone"])
    assert left["alone"] == "no layer stands in front of it"
    before = set(graph.state_dict())
    graph = Fold(tuple(able)).apply(graph)
    x = Normed.data(5).double()
    torch.testing.assert_close(graph(x), model(x), rtol=1e-12, atol=1e-12)
    assert "conv1.bias" in graph.state_dict()
    gone = before - set(graph.state_dict())
    assert {"norm1.weight", "norm1.running_mean", "norm3.num_batches_tracked"} <= gone
    assert "alone.running_var" not in gone


def test_folding_keeps_weights_on_their_grid_with_other_scales():
    model = make(Residual)
    with torch.no_grad():
        model.stem_norm.weight[0] *= -1
    graph = as_graph(copy.deepcopy(model), as_inputs(Residual.data(2)))
    graph = Constrain("stem", Grid(4)).apply(graph)
    before = graph(Residual.data(3))
    codes = graph.stem.parametrizations.weight[0].codes(graph.stem.weight)
    graph = Fold(("stem_norm",)).apply(graph)
    torch.testing.assert_close(graph(Residual.data(3)), before, rtol=1e-4, atol=1e-5)
    after = graph.stem.parametrizations.weight[0].codes(graph.stem.weight)
    assert torch.equal(after[1:], codes[1:])
    assert torch.equal(after[0], 16 - codes[0]), "a factor below zero turns signs around"


def test_a_norm_that_cannot_be_folded_is_refused_with_the_reason():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    graph = graph_module(Shared().eval(), as_inputs(torch.randn(2, 3, 4)))
    assert foldable(graph)[1] == {"norm": "the layer in front of it is read by others too"}
    for name, why in (("norm", "read by others"), ("nrm", "no batch norm of this name")):
        with pytest.raises(GraphError, match=f"{name} cannot be folded into a layer: .*{why}"):
            fold(graph, [name], lambda *_: None)


def test_dropout_and_batch_norm_train_however_the_graph_is_switched():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.norm(x))

    model = make(Net)
    graph = as_graph(copy.deepcopy(model), as_inputs(torch.randn(2, 3)))
    x = torch.randn(64, 3)
    torch.testing.assert_close(graph(x), model(x))
    graph.train()
    assert float((graph(x) == 0).double().mean()) > 0.3
    assert not torch.equal(graph.norm.running_mean, model.norm.running_mean)
    graph.training = False  # as whoever goes through the modules does it
    torch.testing.assert_close(graph(x), graph(x))
    again = copy.deepcopy(graph.train())
    assert again.training
    assert float((again(x) == 0).double().mean()) > 0.3


def test_what_is_no_graph_yet_is_told_so():
    with pytest.raises(EditError, match="Residual is no graph yet: Capture comes first"):
        Fold(("stem_norm",)).apply(make(Residual))
    with pytest.raises(EditError, match="nested in other containers"):
        Capture({}).apply(make(Residual))


def test_constraints_come_along_into_the_graph():
    model = Constrain("wide", Grid(3)).apply(make(Transformer))
    graph = as_graph(copy.deepcopy(model), as_inputs(Transformer.data(2)))
    torch.testing.assert_close(graph(Transformer.data(4)), model(Transformer.data(4)))
    assert list(graph.state_dict()) == list(model.state_dict())
