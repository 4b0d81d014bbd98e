"""A file is handed over only when it answers as the model does, at the batch sizes it says it takes."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.errors import ExportError
from featherweight.export import export, verify
from featherweight.export.verify import check, difference, opened, varied


class Convnet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(left) * self.b(right), left.argmax(1)


class DependsOnSize(nn.Module):
    """Another network for a single input than for several, which no exported graph can be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2 if x.shape[0] == 1 else 1)


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_the_check_says_what_was_written_and_how_far_off_it_is(tmp_path, format):
    model = Convnet()
    found = export(
        model, Inputs((torch.randn(1, 3, 6, 6),)), format, tmp_path / "net", [Inputs((torch.randn(5, 3, 6, 6),))]
    )
    assert (found.format, found.file, found.score) == (format, "net", None)
    assert found.bytes == (tmp_path / "net").stat().st_size
    assert min(found.signal_to_noise_db) > 100
    assert 0 <= found.difference < 1e-5

    x = torch.randn(9, 3, 6, 6)
    with torch.no_grad():
        expected, answer = model.eval()(x), opened(format, tmp_path / "net")(x)
    assert difference(answer, expected) == pytest.approx(float((answer - expected).abs().max() / expected.abs().max()))
    assert difference(answer, expected) < 1e-5


def test_inputs_are_brought_to_the_models_type(tmp_path):
    half = export(Two().half(), Inputs((torch.randn(2, 4), torch.randn(2, 5))), "onnx", tmp_path / "net.onnx")
    assert 1e-12 < half.difference < 1e-2


def test_types_that_onnx_runtime_lacks_are_refused_with_a_way_out(tmp_path):
    with pytest.raises(ExportError, match=r"cannot run net.onnx on the CPU.*export model.float\(\)"):
        export(Convnet().bfloat16(), Inputs((torch.randn(2, 3, 6, 6),)), "onnx", tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(
        ExportError,
        match=r"no format 'onx'; did you mean 'onnx'\?; there are onnx, openvino, executorch, coreml, torch_export",
    ):
        export(Convnet(), Inputs((torch.randn(1, 3, 6, 6),)), "onx", tmp_path / "net.onnx")


@pytest.mark.parametrize(("size", "format"), [(1, "onnx"), (3, "torch_export")])
def test_a_model_that_is_another_at_another_size_gets_a_file_for_the_examples(tmp_path, size, format):
    model, x = DependsOnSize(), torch.randn(size, 4)
    with pytest.warns(
        UserWarning, match=rf"only batches of {size}.*does not answer as DependsOnSize on float32\[1, 4\]"
    ):
        export(model, Inputs((x,)), format, tmp_path / "net", [Inputs((torch.randn(2, 4),))])
    file = opened(format, tmp_path / "net")
    torch.testing.assert_close(file(x), model(x))
    with pytest.raises(Exception, match=r"(?i)got invalid dimensions|to be equal to 3"):
        file(torch.randn(2, 4))


def test_a_file_with_other_answers_is_not_left_behind(tmp_path, monkeypatch):
    """The exporter is made to write a slightly different model, as a fault in it would."""
    captured = verify.capture

    def faulty(model, inputs, **settings):
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            next(wrong.parameters()).mul_(1.01)
        return captured(wrong, inputs, **settings)

    monkeypatch.setattr(verify, "capture", faulty)
    (tmp_path / "net").write_bytes(b"the old file")
    with pytest.raises(
        ExportError, match=r"net does not answer as Linear on float32\[2, 4\]: they differ by 0\.0\d+ of the"
    ):
        export(nn.Linear(4, 3, bias=False), Inputs((torch.randn(2, 4),)), "torch_export", tmp_path / "net")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("net", b"the old file")]

    allowed = export(
        nn.Linear(4, 3, bias=False), Inputs((torch.randn(2, 4),)), "torch_export", tmp_path / "net", tolerance=0.1
    )
    assert allowed.difference == pytest.approx(0.01, rel=1e-3)


def test_a_file_that_fails_is_named_with_the_reason(tmp_path):
    with pytest.raises(ExportError, match=r"net.onnx cannot answer float32\[2, 4\]: .*shapes cannot be multiplied"):
        check(
            nn.Linear(4, 3), nn.Linear(5, 3), [Inputs((torch.randn(2, 4),))], format="onnx", path=tmp_path / "net.onnx"
        )


@given(st.floats(-1e3, 1e3), st.lists(st.floats(-10, 10), min_size=1, max_size=5), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_difference_is_relative_to_the_largest_answer(offset, values, unit):
    b = torch.tensor(values, dtype=torch.float64)
    a = b.clone()
    a[0] += offset
    largest = max(map(abs, values))
    expected = 0.0 if a[0] == b[0] else (abs(float(a[0] - b[0])) / largest if largest else math.inf)
    assert difference({"x": a}, {"x": b}) == pytest.approx(expected)
    if largest > 1e-3:
        assert difference([a * unit], [b * unit]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_difference_of_what_is_not_finite_not_alike_or_not_there():
    inf, nan = math.inf, math.nan
    assert difference(torch.tensor([1.0, -inf, nan]), torch.tensor([1.0, -inf, nan])) == 0
    assert difference(torch.tensor([1.5, -inf, nan]), torch.tensor([2.0, -inf, nan])) == 0.25
    assert difference(torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0])) == inf
    assert difference(torch.tensor([1.0, inf]), torch.tensor([1.0, -inf])) == inf
    assert difference((torch.zeros(2), torch.ones(2)), (torch.zeros(2), torch.full((2,), 4.0))) == 0.75
    assert difference(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ExportError, match=r"different shapes: \[\(2,\)\] against \[\(2, 1\)\]"):
        difference(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ExportError, match=r"different shapes: \[\(2,\)\] against \[\(2,\), \(2,\)\]"):
        difference(torch.zeros(2), (torch.zeros(2), torch.zeros(2)))


def test_made_up_batches_hold_values_the_model_knows():
    tokens, table = torch.tensor([[3, 7], [7, 11]]), torch.randn(1, 2)
    made = varied(Inputs((tokens, table), {"scale": torch.ones(2), "flag": True}), 5)
    assert made.args[0].shape == (5, 2)
    assert set(made.args[0].unique().tolist()) <= {3, 7, 11}
    assert made.args[1] is table
    assert made.kwargs["flag"] is True
    assert made.kwargs["scale"].shape == (5,)
    assert made.kwargs["scale"].std() > 0.1, "a constant example would not tell two models apart"
