"""Core ML packages hold the model: every weight as it is, in the bits it has, in a program that computes the same.

Core ML runs on macOS only. Here the program is read from the package again and computed in PyTorch, operation by
operation, by what Core ML documents of each.
"""

import json
import logging
import math
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight import quantize
from featherweight.batch import Inputs
from featherweight.errors import ExportError
from featherweight.export import coreml, export
from featherweight.export.calling import METADATA
from featherweight.export.packed import pack
from featherweight.export.verify import opened
from featherweight.forms import Binary, Codebook, Grid, Mask, constraints_on

pytest.importorskip("coremltools")


# The program, computed in PyTorch ------------------------------------------------------------------------------------


def conv(x, weight, strides, pad_type, pad, dilations, groups, bias=None):
    assert pad_type in ("valid", "custom")
    before, after = pad[0::2], pad[1::2]
    x = F.pad(x, [int(p) for pair in zip(before.flip(0), after.flip(0), strict=True) for p in pair])
    return F.conv2d(x, weight, bias, strides.tolist(), 0, dilations.tolist(), int(groups))


OPERATIONS = {
    "conv": conv,
    "batch_norm": lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(
        x, mean, variance, gamma, beta, False, 0.0, float(epsilon)
    ),
    "relu": lambda x: x.relu(),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "add": lambda x, y: x + y,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "cast": lambda x, dtype: x.half().float() if dtype == "fp16" else x,
}


def computed(path: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The answers of a package's program, in float32 with the package's own weights."""
    spec, program = coreml.reopened(path)
    main, values = program.functions["main"], dict(given)

    def value(var):
        if var.name in values:
            return values[var.name]
        if not isinstance(var.val, np.ndarray | np.generic):
            return var.val
        found = torch.from_numpy(np.asarray(var.val))
        return found.float() if found.is_floating_point() else found.long()

    for operation in main.operations:
        if operation.op_type == "const":
            continue
        if operation.op_type.startswith("constexpr_"):
            if len(operation.outputs) == 1:
                made = operation.materialized_val_inference().astype(np.float32)
                values[operation.outputs[0].name] = torch.from_numpy(made)
            continue
        arguments = {name: value(var) for name, var in operation.inputs.items() if var is not None}
        values[operation.outputs[0].name] = OPERATIONS[operation.op_type](**arguments)
    return {answer.name: values[answer.name] for answer in spec.description.output}


def weight_bytes(path: Path) -> int:
    return (path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size


def in_file(*arrays: int) -> int:
    """What arrays of so many bytes take in a weight file, the last one filled up: a header, and one for each."""
    return 64 + sum(64 + math.ceil(size / 64) * 64 for size in arrays)


def operation_of(path: Path, kind: str):
    (found,) = [o for o in coreml.reopened(path)[1].functions["main"].operations if o.op_type == kind]
    return found


class Convnet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 20),
        )
        with torch.no_grad():
            self[1].running_mean.normal_()
            self[1].running_var.uniform_(0.5, 2)
        self.eval()


def codebook(layer: nn.Linear | nn.Conv2d, form: Codebook, values: Tensor | None = None) -> nn.Module:
    """A layer confined to a table of random values, at random, every one of them used."""
    layer = form.build(layer)
    (shared,) = constraints_on(layer)
    with torch.no_grad():
        shared.centroids.copy_(torch.randn_like(shared.centroids) if values is None else values)
        count = form.size + form.zero
        shared.indices.copy_(torch.arange(shared.indices.numel()).remainder(count).reshape(shared.indices.shape))
    return layer


X = Inputs((torch.linspace(-1, 1, 2 * 64).reshape(2, 64),))


def written(layer: nn.Module, tmp_path: Path, *, half: bool = False, inputs: Inputs = X):
    check = export(layer, inputs, "coreml", tmp_path / "net.mlpackage", half=half)
    return check, tmp_path / "net.mlpackage"


# Whole networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_convolutional_network_computes_what_the_model_does(tmp_path, half, dynamic):
    torch.manual_seed(0)
    model, path = Convnet(), tmp_path / "net.mlpackage"
    check = export(model, Inputs((torch.randn(2, 3, 8, 8),)), "coreml", path, half=half, dynamic_batch=dynamic)
    assert (check.format, check.file, check.difference, check.runtime) == ("coreml", "net.mlpackage", None, "")
    assert check.bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert "checked structurally, not run: Core ML is on Apple's systems only" in check.notes
    assert "needs iOS 16 or macOS 13" in check.notes
    assert ("takes batches of 1 to 128" in check.notes) == dynamic
    assert any("merged with others in the file, as batch norms are" in note for note in check.notes)
    assert not list(path.rglob("*debug*"))

    described = coreml.reopened(path)[0].description
    (given,), (answer,) = described.input, described.output
    assert (given.name, answer.name) == ("input", "output")
    assert list(given.type.multiArrayType.shape) == ([1, 3, 8, 8] if dynamic else [2, 3, 8, 8])
    for size in (1, 2, 5) if dynamic else (2,):
        x = torch.randn(size, 3, 8, 8)
        found, expected = computed(path, {"input": x})["output"], model(x)
        assert float((found - expected).detach().abs().max() / expected.detach().abs().max()) < (5e-3 if half else 1e-5)
    assert weight_bytes(path) < (0.55 if half else 1.1) * sum(4 * p.numel() for p in model.parameters())


def test_a_network_with_compressed_weights_keeps_its_batch_norms_and_computes_the_same(tmp_path):
    torch.manual_seed(0)
    model = Convnet()
    model[0] = codebook(model[0], Codebook(16))
    model[3] = Grid(8).build(model[3])
    x = torch.randn(3, 3, 8, 8)
    check, path = written(model, tmp_path, inputs=Inputs((x,)))
    torch.testing.assert_close(computed(path, {"input": x})["output"], model(x), atol=1e-5, rtol=1e-5)
    assert "compressed weights: 1 4-bit tables, 1 8-bit linear" in check.notes
    assert "all 9 weights have the model's values" in check.notes


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"total": self.a(left) + self.b(right), "a": self.a(left)}


def test_inputs_and_outputs_keep_their_names(tmp_path):
    left, right = torch.randn(2, 16), torch.randn(2, 16)
    _, path = written(Two(), tmp_path, inputs=Inputs((left,), {"right": right}))
    spec, _ = coreml.reopened(path)
    assert [each.name for each in spec.description.input] == ["left", "right"]
    assert [each.name for each in spec.description.output] == ["total", "a"]
    assert json.loads(spec.description.metadata.userDefined[METADATA])["arguments"] == ["left", "right"]


def test_rounded_activations_are_left_out_and_the_notes_say_so(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    small = fw.compress(Convnet(), quantize.Static(), task=fw.Task(example=x[:1], calibration=x.split(16)))
    check = small.export("coreml", tmp_path / "net.mlpackage")
    assert any(
        note.endswith("activations that the model rounds are computed in floating point") for note in check.notes
    )
    assert any("3 8-bit linear" in note for note in check.notes)
    found, expected = computed(tmp_path / "net.mlpackage", {"input": x})["output"], small.model(x).detach()
    assert 1e-6 < float((found - expected).square().sum() / expected.square().sum()) < 1e-2
    assert small.ledger.checks == (check,)
    assert "not run" in str(small)


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("half", [False, True])
def test_tables_hold_the_models_values_in_so_many_bits(tmp_path, bits, half):
    torch.manual_seed(0)
    layer = codebook(nn.Linear(64, 96), Codebook(2**bits))
    check, path = written(layer, tmp_path, half=half)
    found = operation_of(path, "constexpr_lut_to_dense")
    values = layer.weight.detach().half().float() if half else layer.weight.detach()
    assert np.array_equal(found.materialized_val_inference().astype(np.float32), values.numpy())
    table = np.unique(found.lut.val).astype(np.float32)
    ours = constraints_on(layer)[0].centroids.detach().flatten()
    assert np.array_equal(table, np.unique((ours.half() if half else ours).float().numpy()))

    width = 2 if half else 4
    tables = [2**bits * width] if 2**bits >= 10 else []  # short ones are in the program
    expected = in_file(64 * 96 * bits // 8, 96 * width, *tables)
    assert expected - 64 < weight_bytes(path) <= expected
    assert f"compressed weights: 1 {bits}-bit tables" in check.notes
    assert f"needs {'iOS 18 or macOS 15' if bits == 3 else 'iOS 16 or macOS 13'}" in check.notes


@pytest.mark.parametrize(
    ("form", "shape", "tables"),
    [
        (Codebook(4, channels=8), (32, 64), (4, 1, 4, 1)),
        (Codebook(3, channels=8, zero=True), (32, 64), (4, 1, 4, 1)),
        (Codebook(16, vector=4), (64, 64), (1, 1, 16, 4)),
        (Codebook(4, vector=4, channels=32), (64, 64), (2, 1, 4, 4)),
        (Codebook(4, vector=8, product=True), (256, 64), (1, 8, 4, 8)),
    ],
)
def test_tables_for_groups_of_outputs_and_of_vectors(tmp_path, form, shape, tables):
    torch.manual_seed(0)
    layer = codebook(nn.Linear(shape[1], shape[0], bias=False), form)
    _, path = written(layer, tmp_path)
    found = operation_of(path, "constexpr_lut_to_dense")
    assert found.lut.shape == tables
    assert np.array_equal(found.materialized_val_inference(), layer.weight.detach().numpy())
    torch.testing.assert_close(computed(path, {"input": X.args[0]})["output"], layer(X.args[0]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_grids_keep_their_whole_numbers_and_scales(tmp_path, bits, axis, symmetric):
    torch.manual_seed(0)
    layer = Grid(bits, symmetric=symmetric, axis=axis).build(nn.Linear(64, 96))
    (grid,) = constraints_on(layer)
    check, path = written(layer, tmp_path)
    codes = (grid.codes(layer.weight) + grid.form.low).numpy()
    if bits == 8:
        found = operation_of(path, "constexpr_affine_dequantize")
        assert np.array_equal(found.quantized_data.val, codes)
        assert np.array_equal(found.zero_point.val, grid.zero_point.numpy())
    else:
        found = operation_of(path, "constexpr_blockwise_shift_scale")
        assert np.array_equal(found.data.val, codes)
        assert (found.offset is None) == (not grid.zero_point.any())
    assert np.array_equal(found.scale.val.ravel(), grid.scale.detach().numpy().ravel())
    assert np.array_equal(found.materialized_val_inference(), layer.weight.detach().numpy())
    assert f"compressed weights: 1 {bits}-bit linear" in check.notes
    beside = [] if axis is None else [96 * 4] if symmetric else [96 * 4, 96 * bits // 8]
    beside += [96] if bits == 8 and symmetric and axis == 0 else []  # zero points, which may not be left out there
    expected = in_file(64 * 96 * bits // 8, 96 * 4, *beside)
    assert expected - 64 < weight_bytes(path) <= expected


def test_grids_in_blocks(tmp_path):
    torch.manual_seed(0)
    layer = Grid(4, group=16).build(nn.Linear(64, 32, bias=False))
    _, path = written(layer, tmp_path)
    found = operation_of(path, "constexpr_blockwise_shift_scale")
    assert found.scale.shape == (32, 4)
    assert np.array_equal(found.materialized_val_inference(), layer.weight.detach().numpy())

    layer = Grid(4, group=8 * 9).build(nn.Conv2d(16, 8, 3, bias=False))
    x = Inputs((torch.randn(1, 16, 5, 5),))
    _, path = written(layer, tmp_path, inputs=x)
    found = operation_of(path, "constexpr_blockwise_shift_scale")
    assert found.scale.shape == (8, 2, 1, 1)
    assert np.array_equal(found.materialized_val_inference(), layer.weight.detach().numpy())

    crossing = Grid(4, group=16).build(nn.Conv2d(16, 8, 3, bias=False))  # groups that end in the middle of a kernel
    check, path = written(crossing, tmp_path, inputs=x)
    assert "weight is written as plain numbers: Core ML has no smaller form of it" in check.notes
    torch.testing.assert_close(computed(path, {"input": x.args[0]})["output"], crossing(x.args[0]))


@pytest.mark.parametrize(("form", "bits"), [(Binary(), 1), (Grid(2, symmetric=False), 2), (Grid(3), 3)])
def test_few_values_an_output_are_tables_of_an_output(tmp_path, form, bits):
    torch.manual_seed(0)
    layer = form.build(nn.Linear(512, 16))
    check, path = written(layer, tmp_path, half=True, inputs=Inputs((torch.randn(2, 512),)))
    found = operation_of(path, "constexpr_lut_to_dense")
    assert found.lut.shape == (16, 1, 2**bits, 1)
    assert coreml.close(found.materialized_val_inference(), layer.weight.detach().numpy(), half=True)
    assert f"compressed weights: 1 {bits}-bit tables" in check.notes
    assert weight_bytes(path) <= in_file(512 * 16 * bits // 8, 16 * 2**bits * 2, 16 * 2)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("above", [None, Grid(8), Grid(4), Codebook(8, zero=True)])
def test_pruned_weights_keep_what_is_left(tmp_path, above, half):
    torch.manual_seed(0)
    kept = torch.rand(96, 64) < 0.1
    layer = Mask(int(kept.sum())).build(nn.Linear(64, 96))
    constraints_on(layer)[0].mask.copy_(kept)
    layer = layer if above is None else above.build(layer)
    if isinstance(above, Codebook):
        shared = constraints_on(layer)[-1]
        with torch.no_grad():
            shared.centroids.normal_()
        shared.indices.copy_(torch.where(kept, torch.randint(1, 9, (96, 64)), 0))
    check, path = written(layer, tmp_path, half=half)
    found = operation_of(path, "constexpr_sparse_to_dense").materialized_val_inference()
    assert coreml.close(found.astype(np.float32), layer.weight.detach().numpy(), half=half)
    assert np.array_equal(found != 0, layer.weight.detach().numpy() != 0)
    left = int((layer.weight != 0).sum())
    bits = {None: 16 if half else 32, Grid(8): 8, Grid(4): 4}.get(above, 3)
    scales = 96 * (2 if half else 4) if isinstance(above, Grid) else 0
    parts = (96 * 64 // 8, math.ceil(left * bits / 8), 96 * (2 if half else 4), *([scales] if scales else []))
    assert weight_bytes(path) <= in_file(*parts)
    assert any(note.startswith("compressed weights: 1 sparse") for note in check.notes)
    assert f"needs {'iOS 16 or macOS 13' if above is None else 'iOS 18 or macOS 15'}" in check.notes


def test_what_float16_cannot_say_is_not_rounded_to_it(tmp_path):
    layer = Grid(8).build(nn.Linear(64, 32, bias=False))
    (grid,) = constraints_on(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(1e-5)
        grid.scale.mul_(1e-5)  # far below the least normal number of float16
    assert pack(layer.weight.detach().numpy(), grid, half=True) is None
    assert pack(layer.weight.detach().numpy(), grid, half=False) is not None


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_a_package_that_does_not_hold_the_model_is_not_left_behind(tmp_path, monkeypatch):
    made = coreml._constexpr

    def wrong(form, old, *rest, **where):
        form.table[..., 0, 0] += 0.01
        return made(form, old, *rest, **where)

    monkeypatch.setattr(coreml, "_constexpr", wrong)
    with pytest.raises(ExportError, match=r"net\.mlpackage does not hold weight as the model has it"):
        written(codebook(nn.Linear(64, 32), Codebook(4)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_replaced_and_any_other_folder_is_not(tmp_path):
    written(nn.Linear(64, 32), tmp_path)
    before = weight_bytes(tmp_path / "net.mlpackage")
    written(nn.Linear(64, 64), tmp_path)
    assert weight_bytes(tmp_path / "net.mlpackage") > before
    assert [file.name for file in tmp_path.iterdir()] == ["net.mlpackage"]
    (tmp_path / "other.mlpackage").mkdir()
    with pytest.raises(ExportError, match=r"other\.mlpackage is a folder"):
        export(nn.Linear(64, 32), X, "coreml", tmp_path / "other.mlpackage")


class Determinant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


def test_what_core_ml_converts_for_one_size_only_is_said_to_need_that(tmp_path, caplog):
    model, inputs, path = nn.AdaptiveAvgPool2d(2), Inputs((torch.randn(2, 3, 8, 8),)), tmp_path / "net.mlpackage"
    with pytest.raises(ExportError, match=r"model for batches of any size: Adaptive pooling .*; dynamic_batch=False"):
        export(model, inputs, "coreml", path)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert not path.exists()
    assert export(model, inputs, "coreml", path, dynamic_batch=False).bytes > 0


def test_what_core_ml_lacks_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"coremltools cannot convert the model .*: .*linalg_det"):
        export(Determinant(), Inputs((torch.randn(2, 3, 3),)), "coreml", tmp_path / "net.mlpackage")
    with pytest.raises(ExportError, match=r"Core ML has no bfloat16: export model\.float\(\)"):
        written(nn.Linear(64, 32).bfloat16(), tmp_path)
    with pytest.raises(ExportError, match=r"end in \.mlpackage: name it net\.mlpackage"):
        export(nn.Linear(64, 32), X, "coreml", tmp_path / "net.mlmodel")
    with pytest.raises(ExportError, match="coreml has no opset"):
        export(nn.Linear(64, 32), X, "coreml", tmp_path / "net.mlpackage", opset=18)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(coreml.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs coremltools, not installed here: pip .*featherweight\[coreml\]'"):
        written(nn.Linear(64, 32), tmp_path)


@pytest.mark.skipif(platform.system() == "Darwin", reason="Core ML runs here")
def test_where_core_ml_cannot_run_nothing_is_promised(tmp_path):
    _, path = written(nn.Linear(64, 32), tmp_path)
    with pytest.raises(ExportError, match=r"net\.mlpackage cannot be run here: Core ML is on Apple's systems only"):
        opened("coreml", path)
    for asked in ({"tolerance": 0.1}, {"batches": [X]}):
        with pytest.raises(ExportError, match="cannot be run on this system, only written: leave batches"):
            export(nn.Linear(64, 32), X, "coreml", path, **asked)
    task = fw.Task(example=X.args[0], calibration=[X.args[0]])
    small = fw.compress(nn.Sequential(nn.Linear(64, 32)), quantize.Weights(bits=8, effort="nearest"), task=task)
    with pytest.raises(ExportError, match="coreml cannot be run on this system, only written: leave evaluate out"):
        small.export("coreml", tmp_path / "other.mlpackage", evaluate=lambda model: 0.0)
    assert not (tmp_path / "other.mlpackage").exists()


def test_on_macos_the_answers_are_compared(tmp_path, monkeypatch):
    """Core ML's place is taken by the program computed in PyTorch; all else is what happens on macOS."""
    import coremltools

    def predict(model, arrays):
        answers = computed(Path(model.package_path), {name: torch.from_numpy(a) for name, a in arrays.items()})
        return {name: answer.detach().numpy() * scale for name, answer in answers.items()}

    scale = 1.0
    monkeypatch.setattr(coremltools.models.MLModel, "predict", predict)
    monkeypatch.setattr(coreml, "runs_here", lambda: True)
    format = coreml_format_running(monkeypatch)
    model = Two()
    inputs = Inputs((torch.randn(2, 16), torch.randn(2, 16)))
    check = export(model, inputs, "coreml", tmp_path / "net.mlpackage")
    assert check.difference is not None
    assert check.difference < 1e-5
    assert check.runtime == "coreml"
    assert not any("not run" in note for note in check.notes)
    torch.testing.assert_close(format.load(tmp_path / "net.mlpackage")(*inputs.args), model(*inputs.args))
    scale = 1.1
    with pytest.raises(ExportError, match="does not answer as Two"):
        export(model, inputs, "coreml", tmp_path / "net.mlpackage")


def coreml_format_running(monkeypatch):
    from dataclasses import replace

    from featherweight.export import verify

    format = replace(verify.FORMATS["coreml"], runs_here=lambda: True)
    monkeypatch.setitem(verify.FORMATS, "coreml", format)
    return format
