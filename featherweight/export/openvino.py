"""A model as OpenVINO's files, and such files as a module that answers in OpenVINO on the CPU.

Made from the ONNX file that ONNX Runtime runs as well, so that both compute on the same whole numbers. OpenVINO is
documented at docs.openvino.ai.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from featherweight.errors import ExportError
from featherweight.export import onnx
from featherweight.export.calling import METADATA, FileModel
from featherweight.export.program import first_line
from featherweight.export.quantized import Marks

_NARROWED = ("Multiply", "MatMul", "Convolution", "ConvolutionBackpropData", "GroupConvolution")


def write(
    program: ExportedProgram, path: Path, *, opset: int | None = None, marks: Marks | None = None
) -> tuple[str, ...]:
    """Write a captured program to `path`, an .xml file, with its weights beside it in a .bin file.

    Args:
        program: the model, as `featherweight.export.program.capture` gives it.
        path: the .xml file to write.
        opset: version of ONNX's operators on the way.
        marks: what of it is whole numbers.
    Returns:
        What the reader of the file should know, a sentence each.

    Raises:
        ExportError: an operation has no counterpart, `path` has another ending, or a package is missing.
    """
    _need()
    if path.suffix != ".xml":
        raise ExportError(f"OpenVINO's files end in .xml and .bin: name the first, such as {path.stem}.xml")
    import openvino

    between = path.with_suffix(".onnx")
    notes = onnx.write(program, between, opset=opset, marks=marks, portable=True)
    try:
        import onnx as onnx_format

        written = {p.key: p.value for p in onnx_format.load(between, load_external_data=False).metadata_props}
        model = openvino.convert_model(between)
        _narrow(model)
        model.set_rt_info(written[METADATA], METADATA)
        openvino.save_model(model, path, compress_to_fp16=False)
    except Exception as error:  # its exceptions have no common class of their own
        raise ExportError(f"OpenVINO cannot convert the model: {first_line(error)}") from error
    finally:
        for file in (between, between.with_name(f"{between.name}.data")):
            file.unlink(missing_ok=True)
    return notes


def _narrow(model: Any) -> None:
    """Keep scales and weights in float16 where that holds them exactly; OpenVINO widens them as it loads the file.

    The ONNX file has them so, but conversion works out all that is constant.
    """
    import numpy
    from openvino import opset1

    for node in model.get_ops():
        scale = node.input_value(1).get_node() if node.get_type_name() in _NARROWED else None
        if scale is None or scale.get_type_name() != "Constant" or scale.data.dtype != numpy.float32:
            continue
        with numpy.errstate(over="ignore"):
            half = scale.data.astype(numpy.float16)
        if half.size > 1 and (half == scale.data).all():
            node.input(1).replace_source_output(opset1.convert(opset1.constant(half), "f32").output(0))


class OpenVINOModel(FileModel):
    """An OpenVINO or ONNX file, answering in OpenVINO on the CPU, called as the model was.

    Args:
        path: the .xml file, or an .onnx file.
        threads: of OpenVINO; by default as many as PyTorch uses.
        precision: ``"f32"``, or ``"bf16"`` for what OpenVINO does by default where the processor can.
        rounds_inputs: whether OpenVINO may round what goes into Linear layers with compressed weights to 8 bits as it
            runs, as it does by default where the processor can. No file asks for that.

    Raises:
        ExportError: OpenVINO is not installed or cannot run the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        precision: str = "f32",
        rounds_inputs: bool = False,
    ) -> None:
        _need()
        settings: dict[str, str | int] = {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            **({} if rounds_inputs else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}),
        }
        try:
            model = _core().read_model(os.fspath(path))
            compiled = _core().compile_model(model, "CPU", settings)
        except Exception as error:  # its exceptions have no common class of their own
            raise ExportError(f"OpenVINO cannot run {os.path.basename(path)}: {first_line(error)}") from error
        call = model.get_rt_info(METADATA).value if model.has_rt_info(METADATA) else None
        inputs = {i.any_name: torch.from_numpy(_empty(i)).dtype for i in model.inputs}
        dynamic = any(len(i.partial_shape) and i.partial_shape[0].is_dynamic for i in model.inputs)
        super().__init__(path, inputs, json.loads(call) if call else None, dynamic)
        self.compiled, self.request = compiled, compiled.create_infer_request()

    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        """What OpenVINO answers."""
        found = self.request.infer(dict(arrays), share_inputs=True)
        return [found[output].copy() for output in self.compiled.outputs]


@functools.cache
def _core() -> Any:
    """OpenVINO itself, once for the process and never closed.

    On processors with AVX-512 its first model gives the thread a stack for signals, which closing it takes back. Of two
    that close in the order they were opened, the second puts the freed stack of the first in place, and the next signal
    that Python handles, such as the end of a child process once a ``DataLoader`` had workers, ends the process.
    """
    import openvino

    return openvino.Core()


def _empty(port: Any) -> Any:
    import numpy

    return numpy.empty(0, port.element_type.to_dtype())


def _need() -> None:
    if importlib.util.find_spec("openvino") is None:
        raise ExportError("OpenVINO is not installed here: pip install 'featherweight[openvino]'")
