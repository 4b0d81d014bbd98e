"""ONNX files, read by ONNX Runtime itself or by `OnnxModel`, against the PyTorch model."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.errors import ExportError
from featherweight.export import onnx as room
from featherweight.export.onnx import OnnxModel, session, write
from featherweight.export.program import capture, draft


def export(model: nn.Module, inputs: Inputs, path: Path, **settings: int) -> None:
    """Write a file without holding it against the model afterwards."""
    with draft(path) as file:
        write(capture(model, inputs), file, **settings)


class Residual(nn.Module):
    """A small network with batch norms, a residual connection, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.conv(x)))
        return self.head(x.view(x.shape[0], -1))


class Reader(nn.Module):
    """Keyword inputs, an option, and a dict for an answer, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, double: bool = False) -> dict[str, object]:
        x = self.embed(tokens)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        logits = self.head(x.mean(1)) * (2 if double else 1)
        return {"logits": logits, "inner": (x, None), "tokens": tokens}


def trained_norm(model: nn.Module) -> nn.Module:
    """Give batch norms statistics that would show if they were left out or taken from the batch."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.linspace(-1, 1, norm.num_features)
            norm.running_var = torch.linspace(0.5, 2, norm.num_features)
    return model


def answer(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(*inputs)


def test_a_file_exported_from_one_image_answers_every_batch_size(tmp_path):
    model = trained_norm(Residual()).train()
    export(model, Inputs((torch.randn(1, 3, 6, 6),)), tmp_path / "net.onnx")

    assert all(module.training for module in model.modules())
    runtime = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in runtime.get_inputs()] == ["x"]
    assert [(o.name, o.shape) for o in runtime.get_outputs()] == [("output", ["batch", 5])]
    for size in (1, 2, 7):
        images = torch.randn(size, 3, 6, 6)
        (found,) = runtime.run(["output"], {"x": images.numpy()})
        np.testing.assert_allclose(found, answer(model, images), rtol=1e-4, atol=1e-5)


def test_one_file_holds_the_weights_once_and_nothing_of_this_machine(tmp_path):
    model = nn.Sequential(nn.Linear(400, 10, bias=False), nn.Linear(10, 400), nn.Tanh())  # a factorized layer
    export(model, Inputs((torch.randn(2, 400),)), tmp_path / "factors.onnx")

    assert [file.name for file in tmp_path.iterdir()] == ["factors.onnx"]
    written = onnx.load(tmp_path / "factors.onnx")
    assert Counter(node.op_type for node in written.graph.node)["Tanh"] == 1
    products = [node for node in written.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(products) == 2, "the factors were multiplied together"
    weight_bytes = sum(p.numel() * 4 for p in model.parameters())
    assert weight_bytes < (tmp_path / "factors.onnx").stat().st_size < weight_bytes + 2000
    contents = (tmp_path / "factors.onnx").read_bytes()
    assert b".py" not in contents
    assert b"site-packages" not in contents


def test_tied_weights_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(2000, 16), nn.Linear(16, 2000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    export(Tied(), Inputs((torch.randint(0, 2000, (2, 4)),)), tmp_path / "tied.onnx")
    assert (tmp_path / "tied.onnx").stat().st_size < 1.2 * 2000 * 16 * 4


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> tuple[Reader, OnnxModel, Tensor, Tensor]:
    """A reader, exported with an option set; and what to ask it."""
    model, tokens, mask = Reader().eval(), torch.randint(0, 20, (3, 4)), torch.rand(3, 4)
    path = tmp_path_factory.mktemp("reader") / "reader.onnx"
    export(model, Inputs((tokens,), {"double": True, "mask": mask}), path)
    return model, session(path), tokens, mask


def test_named_inputs_and_a_nested_answer_come_back_as_the_model_gives_them(reader):
    model, file, tokens, mask = reader
    assert list(file.inputs) == ["tokens", "mask"]
    with torch.no_grad():
        expected = model(tokens, mask=mask, double=True)
    for found in (
        file(tokens, mask=mask, double=True),
        file(mask=mask, tokens=tokens),
        file(tokens, mask=mask.double()),  # brought to the file's type
    ):
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["logits"], expected["logits"])
        torch.testing.assert_close(found["inner"][0], expected["inner"][0])
        assert found["inner"][1] is None
        assert torch.equal(found["tokens"], tokens)


def test_a_call_the_file_cannot_answer_is_refused_with_what_it_takes(reader):
    _, file, tokens, mask = reader
    takes = r"reader.onnx takes the tensors tokens, mask, with double=True fixed"
    for wrong, args, kwargs in (
        (": double=False would need another export", (tokens,), {"mask": mask, "double": False}),
        (": double=None would need another export", (tokens,), {"mask": mask, "double": None}),
        (r": maks=float32\[3, 4\] would need another export", (tokens,), {"mask": mask, "maks": mask}),
        (", but was not given mask", (tokens,), {}),
        (", but was given 4 positional arguments", (tokens, True, mask, mask), {}),
        (", but was given mask=1", (tokens,), {"mask": 1}),
    ):
        with pytest.raises(ExportError, match=takes + wrong):
            file(*args, **kwargs)


def test_answers_named_like_other_values_of_the_graph(tmp_path):
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.layer(x)
            return {"relu": y, "linear": y.relu(), "x": x, "layer.weight": y + 1}

    model, x = Swapped().eval(), torch.randn(3, 4)
    export(model, Inputs((x,)), tmp_path / "swapped.onnx")
    found, expected = session(tmp_path / "swapped.onnx")(x), model(x)
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name].detach())


def test_lstm_and_a_transformer_of_frozen_weights(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 8, num_layers=2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    frozen = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True).requires_grad_(False)  # takes the fused kernel
    for model in (Recurrent(), frozen):
        export(model, Inputs((torch.randn(1, 5, 6),)), tmp_path / "net.onnx")
        x = torch.randn(4, 5, 6)
        torch.testing.assert_close(session(tmp_path / "net.onnx")(x), answer(model, x), rtol=1e-4, atol=1e-5)


def test_a_model_that_fixes_its_batch_is_exported_for_it_with_a_warning(tmp_path):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.view(4, 8))

    model, x = Fixed(), torch.randn(4, 8)
    with pytest.warns(
        UserWarning, match=r"Fixed takes only batches of 4, the example's size: its code fixes a length of 4"
    ):
        export(model, Inputs((x,)), tmp_path / "fixed.onnx")
    file = session(tmp_path / "fixed.onnx")
    assert not file.dynamic_batch
    torch.testing.assert_close(file(x), answer(model, x), rtol=1e-4, atol=1e-5)


def test_opset_is_the_one_asked_for(tmp_path):
    export(nn.Linear(3, 2), Inputs((torch.randn(2, 3),)), tmp_path / "net.onnx", opset=21)
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == 21


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize(("opset", "other"), [(9, "a later one"), (99, "an earlier one")])
def test_an_opset_that_cannot_be_is_refused_and_nothing_else_is_said(opset, other, tmp_path, caplog):
    with pytest.raises(ExportError, match=rf"cannot be written in opset {opset}, only in \d+: .* choose {other}"):
        export(Mean(), Inputs((torch.randn(2, 3, 4),)), tmp_path / "net.onnx", opset=opset)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path):
    class Unexportable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    (tmp_path / "net.onnx").write_bytes(b"the old file")
    with pytest.raises(ExportError, match=r"linalg_eig"):
        export(Unexportable(), Inputs((torch.randn(2, 3, 3),)), tmp_path / "net.onnx")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("net.onnx", b"the old file")]

    with pytest.raises(
        ExportError, match=r"torch.export cannot follow Linear called with float32\[2, 4\].*reduction dim"
    ):
        export(nn.Linear(3, 2), Inputs((torch.randn(2, 4),)), tmp_path / "net.onnx")
    with pytest.raises(ExportError, match=r"no folder .*nowhere to write net.onnx into: create it first"):
        export(nn.Linear(3, 2), Inputs((torch.randn(2, 3),)), tmp_path / "nowhere" / "net.onnx")
    with pytest.raises(ExportError, match=r"is a folder: name the file to write"):
        export(nn.Linear(3, 2), Inputs((torch.randn(2, 3),)), tmp_path)


def test_weights_too_large_for_one_file_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "ONE_FILE_BYTES", 1000)
    model, x = nn.Linear(100, 50), torch.randn(2, 100)
    with pytest.warns(UserWarning, match=r"they are in big.onnx.data, which has to stay beside big.onnx"):
        export(model, Inputs((x,)), tmp_path / "big.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    torch.testing.assert_close(session(tmp_path / "big.onnx")(x), answer(model, x), rtol=1e-4, atol=1e-5)


def handmade(path: Path, *answers: str, threads: int | None = None) -> OnnxModel:
    """A file that no exporter of ours wrote: r = relu(a), n = -a."""
    nodes = [onnx.helper.make_node("Relu", ["a"], ["r"]), onnx.helper.make_node("Neg", ["a"], ["n"])]
    typed = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2]) for name in "arn"}
    graph = onnx.helper.make_graph(nodes, "others", [typed["a"]], [typed[name] for name in answers])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path)
    return session(path, threads=threads)


def test_a_file_of_others_gives_a_tensor_or_a_tuple(tmp_path):
    x = torch.tensor([[1.0, -2.0]], requires_grad=True)
    assert torch.equal(handmade(tmp_path / "one.onnx", "r")(x), torch.tensor([[1.0, 0.0]]))
    rectified, negated = handmade(tmp_path / "two.onnx", "r", "n")(a=x)
    assert torch.equal(negated, torch.tensor([[-1.0, 2.0]]))
    assert torch.equal(rectified, torch.tensor([[1.0, 0.0]]))


def test_threads_are_pytorchs_unless_given(tmp_path):
    used = [
        handmade(tmp_path / "net.onnx", "r", threads=threads).session.get_session_options().intra_op_num_threads
        for threads in (None, 3)
    ]
    assert used == [torch.get_num_threads(), 3]


def test_a_file_that_onnx_runtime_refuses_says_what_to_do(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot run broken.onnx on the CPU"):
        session(tmp_path / "broken.onnx")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"ONNX needs onnx and onnxscript.*pip install 'featherweight\[onnx\]'"):
        export(nn.Linear(3, 2), Inputs((torch.randn(2, 3),)), tmp_path / "net.onnx")
