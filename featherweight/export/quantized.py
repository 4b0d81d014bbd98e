"""Whole numbers in an exported file: weights and activations marked in the graph, then written as ONNX has them.

PyTorch's exporter knows roundings of 8 bits only. So every confined weight and every rounded activation is passed
through an operation of no meaning, which comes out of the exporter as a node of our own, and is then replaced by
QuantizeLinear and DequantizeLinear, with the weights' whole numbers inside the file. How ONNX Runtime wants them is
described at onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.errors import ExportError
from featherweight.export.space_to_depth import unstrided
from featherweight.forms import Constrained, Rounded, Rounding, constrained_tensors, constraints_on, released
from featherweight.forms.grid import Gridded

DOMAIN = "featherweight"  # of our own nodes, all gone before a file is written
# ONNX operations that only move numbers about, or choose among them: what is whole before them is whole behind.
MOVING = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Pad")
BLOCKS = (16, 32, 64, 128, 256)  # values with one scale that MatMulNBits takes
NARROWER = {"float32": ("float16", "bfloat16"), "int32": ("int8", "int16")}  # the least first
NODE_BYTES = 32  # about what a Cast takes in a file

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of whole numbers.

    Attributes:
        codes: q, int64, of the tensor's shape.
        bits: of each.
        scale, zero_point: of shape (), (indices,) along the axis, or (indices, groups).
        axis, group: as in `Grid`.
        signed: whether q can be less than 0.
    """

    codes: Array
    bits: int
    scale: Array
    zero_point: Array
    axis: int | None
    group: int = 0
    signed: bool = True


@dataclass(frozen=True, eq=False)
class Activation:
    """A rounded activation: its grid, and scale and zero point where they are kept."""

    form: Rounding
    scale: float = 1.0
    zero_point: int = 0


Marks = Mapping[str, Weight | Activation]


def is_quantized(model: nn.Module) -> bool:
    """Whether any activation of the model is rounded."""
    return any(isinstance(module, Rounded) for module in model.modules())


def marked(model: nn.Module) -> tuple[nn.Module, Marks]:
    """A copy of the model with every whole-numbered weight and every rounded activation marked, and what they are.

    Tensors that are confined otherwise become ordinary ones; where nothing is confined, it is the model itself.
    """
    marks: dict[str, Weight | Activation] = {}
    for path, module, tensor in constrained_tensors(model):
        constraint = constraints_on(module, tensor)[-1]
        found = _weight(getattr(module, tensor).detach(), constraint)
        if found is not None:
            marks[f"{path}.{tensor}"] = found
    rounded = {name: module for name, module in model.named_modules() if isinstance(module, Rounded)}
    if not marks and not rounded:
        return released(model), {}
    plain = released(model)
    plain = copy.deepcopy(model) if plain is model else plain
    for name in marks:
        path, _, tensor = name.rpartition(".")
        parametrize.register_parametrization(plain.get_submodule(path), tensor, _Marked(name), unsafe=True)
    for name, module in rounded.items():
        path, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(path), leaf, _Marked(name))
        form = module.form
        marks[name] = (
            Activation(form) if form.dynamic else Activation(form, float(module.scale), round(float(module.zero_point)))
        )
    return plain, marks


class _Marked(nn.Module):
    """Comes out of PyTorch's exporter as a node of our own that names what passes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Marked", (x,), {"name": self.name}, dtype=x.dtype, shape=x.shape, version=1
        )
        return made


def _weight(value: Tensor, constraint: Constrained) -> Weight | None:
    """A confined weight as whole numbers, whatever confines it; None where it is no such."""
    if isinstance(constraint, Gridded):
        form, codes = constraint.form, constraint.codes(value)
        assert codes is not None
        return Weight(
            (codes + form.low).numpy(force=True),
            form.bits,
            constraint.scale.detach().float().numpy(force=True),
            constraint.zero_point.detach().long().numpy(force=True),
            form.axis,
            form.group,
            form.signed,
        )
    if value.ndim < 2:
        return None
    # Two or three values, −s, 0 and s, with one s for every output: what binary and ternary weights are.
    scale = value.flatten(1).abs().amax(1)
    spread = scale.reshape(-1, *(1 for _ in value.shape[1:]))
    codes = value.sign().long()
    if not bool((codes * spread == value).all()):
        return None
    bits = 1 if bool((codes != 0).all()) else 2
    scale = torch.where(scale > 0, scale, 1).float()
    return Weight(codes.numpy(force=True), bits, scale.numpy(force=True), np.zeros(len(scale), np.int64), 0)


def least_opset(marks: Marks) -> int | None:
    """The first of ONNX's opsets that has the types the marks need; None where any will do."""
    sixteen = any(isinstance(m, Activation) and m.form.bits == 16 for m in marks.values())
    four = any(isinstance(m, Weight) and m.bits == 4 for m in marks.values())
    return 21 if sixteen or four else None


def emit(model: Any, marks: Marks, *, portable: bool = False) -> tuple[str, ...]:
    """Write marks into an ONNX model, in place, as ONNX has them.

    Args:
        model: an ``onnx_ir.Model`` out of PyTorch's exporter.
        marks: as `marked` gives them.
        portable: whether to keep to what runtimes other than ONNX Runtime know and are fast at: 4-bit weights of
            Linear layers do not become MatMulNBits then, an operation of its own, activations of 16 bits are left in
            float32, and first convolutions keep their strides.
    Returns:
        What the reader of the file should know, a sentence each.
    """
    return _Emitter(model, marks, portable).run()


class _Emitter:
    def __init__(self, model: Any, marks: Marks, portable: bool) -> None:
        import onnx_ir as ir

        self.ir, self.model, self.graph, self.marks, self.portable = ir, model, model.graph, marks, portable
        self.notes: list[str] = []
        self.tables: dict[tuple[int, int, int], Any] = {}
        self.count = 0

    def run(self) -> tuple[str, ...]:
        own = [node for node in self.graph if node.domain == DOMAIN]
        for node in own:
            mark = self.marks[node.attributes["name"].as_string()]
            if isinstance(mark, Activation):
                self._activation(node, mark)
        for node in list(self.graph):
            self._whole_behind(node)
        for node in list(self.graph):
            self._mean_as_pool(node)
        for node in own:
            mark = self.marks[node.attributes["name"].as_string()]
            if isinstance(mark, Weight):
                self._weight(node, node.attributes["name"].as_string(), mark)
        for node in list(self.graph):
            self._dynamic_gemm(node)
            self._strided(node)
            self._bias(node)
        for node in list(self.graph):
            self._redundant(node)
            self._in_float(node)
        for value in list(self.graph.initializers.values()):  # to which narrower ones are added
            self._narrow(value)
        self._unused()
        self.model.opset_imports.pop(DOMAIN, None)
        return tuple(dict.fromkeys(self.notes))

    # Activations ----------------------------------------------------------------------------------------------------

    def _activation(self, node: Any, mark: Activation) -> None:
        x, grid = node.inputs[0], mark.form.grid
        if mark.form.dynamic:
            if self.portable:
                self.notes.append("layers that find their range at every call are computed in floating point there")
            made = self._add(node, "DynamicQuantizeLinear", [x], outputs=3)
            result = self._add(node, "DequantizeLinear", list(made.outputs)).outputs[0]
            self._replace(node, result)
            return
        if grid.bits == 16 and self.portable:
            self.notes.append("activations of 16 bits are left in float32, for want of such whole numbers there")
            self._replace(node, x)
            return
        kind = _stored_as(grid.bits, signed=grid.signed)
        if grid.bits not in (8, 16):  # the type reaches further than the grid
            ends = [np.float32((q - mark.zero_point) * np.float32(mark.scale)) for q in (grid.low, grid.high)]
            x = self._add(node, "Clip", [x, *(self._constant(np.array(end)) for end in ends)]).outputs[0]
        scale = self._constant(np.array(mark.scale, np.float32))
        zero_point = self._constant(np.array(mark.zero_point, kind))
        whole = self._add(node, "QuantizeLinear", [x, scale, zero_point]).outputs[0]
        result = self._add(node, "DequantizeLinear", [whole, scale, zero_point]).outputs[0]
        self._replace(node, result)

    def _whole_behind(self, node: Any) -> None:
        """Round behind what only moves whole numbers about, so that it moves them as whole ones."""
        if node.op_type not in MOVING or node.domain or not node.inputs or node.inputs[0] is None:
            return
        before = node.inputs[0].producer()
        if before is None or before.op_type != "DequantizeLinear" or len(before.inputs) < 3:
            return
        source = before.inputs[0].producer()
        if source is None or source.op_type != "QuantizeLinear":
            return
        result = node.outputs[0]
        if result.is_graph_output() or len(node.outputs) > 1:
            return
        readers = list(result.uses())
        if all(use.node.op_type == "QuantizeLinear" for use in readers):
            return
        whole = self._add(node, "QuantizeLinear", [result, *before.inputs[1:3]], after=True)
        back = self._add(whole, "DequantizeLinear", [whole.outputs[0], *before.inputs[1:3]], after=True).outputs[0]
        for use in readers:
            use.node.replace_input_with(use.idx, back)

    def _mean_as_pool(self, node: Any) -> None:
        """A mean over all positions as the pool that it is, which runtimes compute on whole numbers."""
        if node.op_type != "ReduceMean" or not _from_whole(node.inputs[0]) or len(node.inputs) < 2:
            return
        axes = node.inputs[1].const_value
        shape = node.inputs[0].shape
        if axes is None or shape is None or len(shape) < 3:
            return
        if sorted(int(a) % len(shape) for a in axes.numpy().ravel()) != list(range(2, len(shape))):
            return
        made = self._add(node, "GlobalAveragePool", [node.inputs[0]])
        result = made.outputs[0]
        keeps = node.attributes.get("keepdims")
        if keeps is not None and not keeps.as_int():
            readers = [use.node for use in node.outputs[0].uses()]
            if len(readers) == 1 and readers[0].op_type == "QuantizeLinear":  # round first, then only move
                scale = list(readers[0].inputs[1:3])
                whole = self._add(node, "QuantizeLinear", [result, *scale]).outputs[0]
                result = self._add(node, "DequantizeLinear", [whole, *scale]).outputs[0]
            lengths = self._constant(np.array([0, -1], np.int64))
            result = self._add(node, "Reshape", [result, lengths]).outputs[0]
        self._replace(node, result)

    def _dynamic_gemm(self, node: Any) -> None:
        """A Linear whose input finds its range at every call, as the product of whole numbers that it is.

        ONNX Runtime makes it of a MatMul by itself, but a MatMul of matrices becomes a Gemm before it comes to that.
        """
        if node.op_type != "Gemm" or not _from_whole(node.inputs[0], "DynamicQuantizeLinear"):
            return
        weight = node.inputs[1].producer()
        if weight is None or weight.op_type != "DequantizeLinear" or weight.inputs[0].const_value is None:
            return
        if _int(node, "transB") != 1 or _int(node, "transA"):
            return
        x, x_scale, x_zero = node.inputs[0].producer().inputs
        codes, scale, zero = (value.const_value.numpy() for value in weight.inputs)
        turned = self._constant(np.ascontiguousarray(codes.T), f"{weight.inputs[0].name}_turned")
        made = self._add(node, "MatMulInteger", [x, turned, x_zero, self._constant(zero)]).outputs[0]
        step = self._add(node, "Mul", [x_scale, self._constant(scale)]).outputs[0]
        result = self._add(node, "Mul", [self._cast(node, made, "FLOAT"), step]).outputs[0]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = self._add(node, "Add", [result, node.inputs[2]]).outputs[0]
        self._replace(node, result)

    def _strided(self, node: Any) -> None:
        """A first convolution without its strides, whose pixels ONNX Runtime's kernel gathers in longer runs."""
        if (
            self.portable
            or node.op_type != "Conv"
            or not _from_whole(node.inputs[0], "QuantizeLinear")
            or _int(node, "group") > 1
        ):
            return
        before, weight, shape = node.inputs[0].producer(), node.inputs[1].producer(), node.inputs[0].shape
        if weight is None or weight.op_type != "DequantizeLinear" or weight.inputs[0].const_value is None:
            return
        numbers = {name: list(node.attributes[name].as_ints()) for name in ("strides", "pads", "dilations")}
        static = shape is not None and len(shape) == 4 and all(isinstance(length, int) for length in shape[2:])
        of_input, of_weight = (
            part.inputs[2].const_value.numpy() if len(part.inputs) > 2 else np.zeros(1, np.int8)
            for part in (before, weight)
        )
        # The runtime has SpaceToDepth for unsigned bytes; a weight has gaps where one value is 0 for all outputs.
        if not static or max(numbers["dilations"]) > 1 or of_input.dtype != np.uint8 or np.ptp(of_weight):
            return
        codes, zero = weight.inputs[0].const_value.numpy(), int(of_weight.flat[0])
        size = [int(length) for length in shape[2:]]
        made = unstrided(codes, size, numbers["strides"], numbers["pads"], zero)
        if made is None:
            return
        moved = self._constant(made.weight, f"{weight.inputs[0].name}_unstrided")
        values = self._add(node, "DequantizeLinear", [moved, *weight.inputs[1:]], {"axis": _int(weight, "axis")})
        laid = self._add(node, "SpaceToDepth", [before.inputs[0]], {"blocksize": made.block}).outputs[0]
        x = self._add(node, "DequantizeLinear", [laid, *before.inputs[1:]]).outputs[0]
        node.replace_input_with(0, x)
        node.replace_input_with(1, values.outputs[0])
        for name, found in (("strides", [1, 1]), ("pads", made.pads), ("kernel_shape", made.weight.shape[2:])):
            node.attributes[name] = self.ir.AttrInt64s(name, list(found))

    def _redundant(self, node: Any) -> None:
        """Take out what a rounding behind it does as well: ReLU and clips whose ends are those of the range."""
        if node.op_type not in ("Relu", "Clip") or node.outputs[0].is_graph_output():
            return
        readers = [use.node for use in node.outputs[0].uses()]
        if not readers or any(reader.op_type != "QuantizeLinear" for reader in readers):
            return
        low, high = 0.0, np.inf
        if node.op_type == "Clip":
            ends = [v.const_value if v is not None else None for v in (*node.inputs[1:], None, None)][:2]
            low, high = (
                (-np.inf if ends[0] is None else float(ends[0].numpy())),
                (np.inf if ends[1] is None else float(ends[1].numpy())),
            )
        for reader in readers:
            scale, zero = (v.const_value.numpy() for v in reader.inputs[1:3])
            limits = np.iinfo(zero.dtype)
            reach = [float(scale) * (q - float(zero)) for q in (limits.min, limits.max)]
            if reach[0] < low - 1e-6 * float(scale) or reach[1] > high + 1e-3 * float(scale):
                return
        self._replace(node, node.inputs[0])

    def _in_float(self, node: Any) -> None:
        """Keep ONNX Runtime from rounding float weights to 8 bits with one scale, as it does behind DequantizeLinear.

        Its optimizer (``weight_bias_quantization.cc``) does not look behind a maximum, here of one value: the value.
        """
        if self.portable or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return
        before, weight = (value.producer() for value in node.inputs[:2])
        if before is None or before.op_type != "DequantizeLinear" or not _constant(node.inputs[1]):
            return
        if weight is None or weight.op_type != "DequantizeLinear":
            node.replace_input_with(0, self._add(node, "Max", [node.inputs[0]]).outputs[0])

    # Weights --------------------------------------------------------------------------------------------------------

    def _weight(self, node: Any, name: str, mark: Weight) -> None:
        readers = _readers(node)
        turned = [reader for reader in readers if reader.op_type == "Transpose"]
        if mark.bits == 4 and not self.portable and readers:
            each = [self._as_blocks(reader, mark, name) for reader in readers]
            if all(each):
                return
        if mark.group and mark.codes[0].size % mark.group:
            reason = f"its groups of {mark.group} do not fill its rows"
            warnings.warn(f"{name} is written as float32: {reason}", UserWarning, stacklevel=2)
            self._replace(node, node.inputs[0])
        elif len(turned) == len(readers) and readers and mark.codes.ndim == 2 and not mark.group:
            # A Linear on more than two dimensions multiplies by the transposed weight.
            axis = None if mark.axis is None else 1 - mark.axis
            mark = replace(mark, codes=mark.codes.T, axis=axis)
            made = self._dequantized(node, name, mark, [user for reader in turned for user in _readers(reader)])
            for reader in turned:
                self._replace(reader, made)
        else:
            self._replace(node, self._dequantized(node, name, mark, readers))

    def _dequantized(self, node: Any, name: str, mark: Weight, readers: list[Any]) -> Any:
        """The weight's values, out of its whole numbers as they are stored."""
        value = self._stored(node, name, mark)
        scale, shape = mark.scale.astype(np.float32), mark.codes.shape
        if readers and all(map(_reads_whole, readers)) and not mark.group and mark.bits <= 8:
            axis = {} if mark.axis is None else {"axis": mark.axis % len(shape)}
            parts = [value, self._constant(scale)]
            # Left out it is 0, for all that ONNX Runtime fuses but a Gemm.
            if mark.zero_point.any() or any(reader.op_type != "Conv" for reader in readers):
                parts.append(self._constant(mark.zero_point.astype(_stored_as(mark.bits, mark.signed))))
            return self._add(node, "DequantizeLinear", parts, axis).outputs[0]
        # Nothing is computed on whole numbers here: in a form that runtimes work out once, as they load the file.
        value = self._cast(node, value, "FLOAT")
        spread = [1] * len(shape)
        if mark.group:
            value = self._shaped(node, value, shape[0], -1, mark.group)
            spread = [*scale.shape, 1]
        elif mark.axis is not None:
            spread[mark.axis] = -1
        if mark.zero_point.any():
            shift = self._constant(mark.zero_point.astype(np.float32).reshape(spread))
            value = self._add(node, "Sub", [value, shift]).outputs[0]
        value = self._add(node, "Mul", [value, self._constant(scale.reshape(spread))]).outputs[0]
        return self._shaped(node, value, *shape) if mark.group else value

    def _stored(self, node: Any, name: str, mark: Weight) -> Any:
        """The whole numbers, in as many bits as they have, as a tensor of 8 or 16."""
        kind = _stored_as(mark.bits, mark.signed)
        if mark.bits > 4:
            return self._constant(mark.codes.astype(kind), f"{name}_quantized")
        if mark.bits == 4:
            import ml_dtypes

            four = mark.codes.astype(ml_dtypes.int4 if mark.signed else ml_dtypes.uint4)
            return self._cast(node, self._constant(four, f"{name}_quantized"), "INT8" if mark.signed else "UINT8")
        self.notes.append(f"weights of {mark.bits} bits are stored as tables: they take less room, and no less time")
        least, step = (-1, 2) if mark.bits == 1 else (int(mark.codes.min()), 1)  # binary weights are −1 and 1
        codes = ((mark.codes - least) // step).ravel()
        # Three bits are two and one.
        widths = {1: ((0, 1),), 2: ((0, 2),), 3: ((0, 2), (2, 1))}[mark.bits]
        parts = [
            self._from_table(node, name, (codes >> at) & ((1 << width) - 1), width, step << at, 0 if at else least)
            for at, width in widths
        ]
        whole = parts[0] if len(parts) == 1 else self._add(node, "Add", parts).outputs[0]
        whole = self._shaped(node, whole, *mark.codes.shape)
        return whole if mark.signed else self._cast(node, whole, "UINT8")

    def _from_table(self, node: Any, name: str, codes: Array, width: int, step: int, least: int) -> Any:
        """Codes of one or two bits, packed into bytes, looked up byte by byte: a flat int8 tensor."""
        each = 8 // width
        padded = np.pad(codes, (0, -len(codes) % each)).reshape(-1, each).astype(np.uint8)
        shifts = (np.arange(each) * width).astype(np.uint8)
        packed = (padded << shifts).sum(1).astype(np.uint8)
        table = ((np.arange(256)[:, None] >> shifts) & ((1 << width) - 1)) * step + least
        places = self._cast(node, self._constant(packed, f"{name}_packed_{width}"), "INT32")
        known = self.tables.get((width, step, least))
        self.tables[width, step, least] = known = known or self._constant(table.astype(np.int8))
        found = self._add(node, "Gather", [known, places]).outputs[0]
        flat = self._shaped(node, found, -1)
        ends = [self._constant(np.array([n], np.int64)) for n in (0, len(codes))]
        return self._add(node, "Slice", [flat, *ends]).outputs[0]

    def _as_blocks(self, reader: Any, mark: Weight, name: str) -> bool:
        """Make a Linear with 4-bit weights ONNX Runtime's MatMulNBits, where it can be; whether it could."""
        matmul, turned = reader, False
        if reader.op_type == "Transpose" and len(_readers(reader)) == 1:
            (matmul,) = _readers(reader)
            turned = matmul.op_type == "MatMul" and matmul.inputs[1] is reader.outputs[0]
        gemm = matmul.op_type == "Gemm" and _int(matmul, "transB") == 1 and not _int(matmul, "transA")
        if not (gemm or turned) or mark.axis != 0 or mark.codes.ndim != 2:
            return False
        if _from_whole(matmul.inputs[0]):
            return False
        outputs, inputs = mark.codes.shape
        block = mark.group or next((b for b in reversed(BLOCKS) if inputs % b == 0), 0)
        if block not in BLOCKS:
            return False
        count = -(-inputs // block)
        scale = mark.scale if mark.group else np.repeat(mark.scale[:, None], count, 1)
        zero = mark.zero_point if mark.group else np.repeat(mark.zero_point[:, None], count, 1)
        low = 8 if mark.signed else 0
        codes = np.pad(mark.codes + low, ((0, 0), (0, count * block - inputs)), constant_values=8)
        nibbles = codes.reshape(outputs, count, block // 2, 2).astype(np.uint8)
        packed = nibbles[..., 0] | (nibbles[..., 1] << 4)
        parts = [self._constant(packed, f"{name}_packed_4"), self._constant(scale.astype(np.float32).ravel())]
        if (zero + low != 8).any():
            filled = np.pad(zero + low, ((0, 0), (0, count % 2)), constant_values=8).astype(np.uint8)
            pairs = filled.reshape(outputs, -1, 2)
            parts.append(self._constant((pairs[..., 0] | (pairs[..., 1] << 4)).ravel()))
        numbers = {"K": inputs, "N": outputs, "bits": 4, "block_size": block}
        made = self._add(matmul, "MatMulNBits", [matmul.inputs[0], *parts], numbers, domain="com.microsoft")
        self.model.opset_imports["com.microsoft"] = 1
        result = made.outputs[0]
        if gemm and len(matmul.inputs) > 2 and matmul.inputs[2] is not None:
            result = self._add(matmul, "Add", [result, matmul.inputs[2]]).outputs[0]
        self._replace(matmul, result)
        return True

    def _bias(self, node: Any) -> None:
        """The bias of a layer on whole numbers as whole numbers of 32 bits, in steps of the two scales' product.

        Other runtimes than ONNX Runtime add biases in float32.
        """
        if node.op_type not in ("Conv", "Gemm", "ConvTranspose") or len(node.inputs) < 3 or node.inputs[2] is None:
            return
        made = [value.producer() for value in node.inputs[:2]]
        if self.portable or any(p is None or p.op_type != "DequantizeLinear" for p in made):
            return
        scales = [p.inputs[1] for p in made]
        bias = node.inputs[2].const_value
        if bias is None or any(scale.const_value is None for scale in scales):
            return
        step = (scales[0].const_value.numpy() * scales[1].const_value.numpy()).astype(np.float32)
        codes = np.rint(bias.numpy().astype(np.float64) / step)
        if np.abs(codes).max(initial=0) >= 2**31:
            return
        # Runtimes multiply once, as they load the file: what the product is need not be in it.
        parts = [self._constant(codes.astype(np.int32)), self._add(node, "Mul", scales).outputs[0]]
        axis = {"axis": 0} if step.ndim else {}
        node.replace_input_with(2, self._add(node, "DequantizeLinear", parts, axis).outputs[0])

    def _narrow(self, value: Any) -> None:
        """Store what is constant in the least type that holds it exactly; runtimes widen it as they load the file."""
        if value.const_value is None or not list(value.uses()):
            return
        wide = value.const_value.numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            each = (wide.astype(kind) for kind in NARROWER.get(wide.dtype.name, ()))
            found = next((narrow for narrow in each if (narrow == wide).all()), None)
        if found is not None and wide.nbytes - found.nbytes > NODE_BYTES:
            kind = value.const_value.dtype.name
            cast = self._cast(self.graph[0], self._constant(found), kind)
            self.ir.convenience.replace_all_uses_with(value, cast)

    # The graph ------------------------------------------------------------------------------------------------------

    def _constant(self, array: Array, name: str = "") -> Any:
        self.count += 1
        name = name or f"#{self.count}"
        if name in self.graph.initializers:
            name = f"{name}_{self.count}"
        tensor = self.ir.tensor(array, name=name)
        value = self.ir.Value(
            name=name, type=self.ir.TensorType(tensor.dtype), shape=self.ir.Shape(array.shape), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _add(
        self,
        beside: Any,
        operation: str,
        inputs: list[Any],
        numbers: Mapping[str, int] | None = None,
        *,
        outputs: int = 1,
        domain: str = "",
        after: bool = False,
    ) -> Any:
        attributes = [self.ir.AttrInt64(key, value) for key, value in (numbers or {}).items()]
        made = self.ir.Node(domain, operation, inputs, attributes, num_outputs=outputs)
        for value in made.outputs:
            self.count += 1
            value.name = f"#{self.count}"
        (self.graph.insert_after if after else self.graph.insert_before)(beside, made)
        made.name = None  # given by the graph; nobody asks for it, and there are hundreds
        return made

    def _cast(self, beside: Any, value: Any, kind: str) -> Any:
        return self._add(beside, "Cast", [value], {"to": int(self.ir.DataType[kind])}).outputs[0]

    def _shaped(self, beside: Any, value: Any, *shape: int) -> Any:
        return self._add(beside, "Reshape", [value, self._constant(np.array(shape, np.int64))]).outputs[0]

    def _replace(self, node: Any, value: Any) -> None:
        old = node.outputs[0]
        if value.shape is None:
            value.type, value.shape = old.type, old.shape
        if old.is_graph_output():
            if value.is_graph_input() or value.producer() is None:
                value = self._add(node, "Identity", [value]).outputs[0]
            value.name, old.name = old.name, f"{old.name}_before"
            value.type, value.shape = old.type, old.shape
            for at, output in enumerate(self.graph.outputs):
                if output is old:
                    self.graph.outputs[at] = value
        self.ir.convenience.replace_all_uses_with(old, value)
        self.graph.remove(node, safe=True)

    def _unused(self) -> None:
        """Take out what nothing reads any more, and what DequantizeLinear's results are, which its inputs tell."""
        gone = True
        while gone:
            gone = False
            for node in list(self.graph):
                if all(not list(v.uses()) and not v.is_graph_output() for v in node.outputs):
                    self.graph.remove(node, safe=True)
                    gone = True
        for name, value in list(self.graph.initializers.items()):
            if not list(value.uses()) and not value.is_graph_output():
                del self.graph.initializers[name]
        for node in self.graph:
            if node.op_type == "DequantizeLinear" and not node.outputs[0].is_graph_output():
                node.outputs[0].type = node.outputs[0].shape = None


def _from_whole(value: Any, *by: str) -> bool:
    """Whether a value is an activation that was rounded, by one of these operations."""
    made = value.producer() if value is not None else None
    if made is None or made.op_type != "DequantizeLinear":
        return False
    source = made.inputs[0].producer()
    return source is not None and source.op_type in (by or ("QuantizeLinear", "DynamicQuantizeLinear"))


def _constant(value: Any) -> bool:
    """Whether a runtime can work a value out as it loads the file."""
    made = value.producer()
    if made is None:
        return value.const_value is not None
    return all(each is None or _constant(each) for each in made.inputs)


def _reads_whole(node: Any) -> bool:
    return node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and _from_whole(node.inputs[0])


def _readers(node: Any) -> list[Any]:
    return [use.node for use in node.outputs[0].uses()]


def _int(node: Any, name: str) -> int:
    found = node.attributes.get(name)
    return 0 if found is None else int(found.as_int())


def _stored_as(bits: int, signed: bool = True) -> Any:
    if bits == 16:
        return np.int16 if signed else np.uint16
    return np.int8 if signed else np.uint8


def check_opset(marks: Marks, opset: int | None) -> int | None:
    """The opset to write in.

    Raises:
        ExportError: the one that was asked for lacks a type.
    """
    needed = least_opset(marks)
    if needed is None:
        return opset
    if opset is not None and opset < needed:
        raise ExportError(
            f"opset {opset} has no whole numbers of 4 and 16 bits, which this model has: leave opset out, or give "
            f"{needed} or more"
        )
    return opset or needed
