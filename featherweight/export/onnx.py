"""A model as an ONNX file, and an ONNX file as a module that answers in ONNX Runtime.

ONNX is documented at onnx.ai, the exporter at docs.pytorch.org/docs/stable/onnx_export.html.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from featherweight.errors import ExportError
from featherweight.export.calling import METADATA, FileModel, leaves
from featherweight.export.program import first_line, has_dynamic_batch, quiet
from featherweight.export.quantized import Marks, check_opset, emit

ONE_FILE_BYTES = 1_500_000_000  # of weights; one protobuf message, which an ONNX file is, ends at 2 GiB


def session(path: str | os.PathLike[str], *, threads: int | None = None) -> OnnxModel:
    """An ONNX file as a module: `OnnxModel`."""
    return OnnxModel(path, threads=threads)


def write(
    program: ExportedProgram,
    path: Path,
    *,
    opset: int | None = None,
    marks: Marks | None = None,
    portable: bool = False,
) -> tuple[str, ...]:
    """Write a captured program to `path` as one ONNX file with its weights inside.

    Inputs keep the names of the arguments of the model's `forward`; outputs are called ``output``, ``output_0``,
    ``output_1``, or after the keys of a dict. Weights of more than 1.5 GB do not fit inside: they go to a second file,
    named ``….onnx.data``, and a warning says so.

    Args:
        program: the model, as `featherweight.export.program.capture` gives it.
        path: the file to write.
        opset: version of ONNX's operators; by default the one PyTorch's exporter is written for, or a later one that
            has the types it takes.
        marks: what of it is whole numbers, as `featherweight.export.quantized.marked` gives it.
        portable: whether to keep to ONNX's own operators.
    Returns:
        What the reader of the file should know, a sentence each.

    Raises:
        ExportError: an operation has no counterpart in ONNX, or not in this `opset`, or a package is missing.
    """
    _need("onnx", "onnxscript")
    opset = check_opset(marks or {}, opset)
    call, inputs, outputs = naming(program)
    batch_axes = [{0: "batch"}] * len(inputs) if has_dynamic_batch(program) else None
    with quiet():
        try:
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=batch_axes,
            )
        except Exception as error:  # the exporter raises its own errors and whatever its translations do
            raise ExportError(f"PyTorch's ONNX exporter failed: {_root(error)}") from error
    graph = made.model.graph
    if opset is not None and (written := made.model.opset_imports[""]) != opset:
        other = "a later" if opset < written else "an earlier"
        raise ExportError(
            f"the model cannot be written in opset {opset}, only in {written}: leave opset out, or choose {other} one"
        )
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name  # the exporter renames an input that is also an output
    notes = emit(made.model, marks or {}, portable=portable)
    _strip(made.model)
    made.model.metadata_props[METADATA] = json.dumps(call)
    weight_bytes = sum(value.const_value.nbytes for value in graph.initializers.values())
    made.save(path, external_data=weight_bytes > ONE_FILE_BYTES)
    if weight_bytes > ONE_FILE_BYTES:
        warnings.warn(
            f"{weight_bytes / 1e9:.1f} GB of weights do not fit into one ONNX file: "
            f"they are in {path.name}.data, which has to stay beside {path.name}",
            UserWarning,
            stacklevel=3,
        )
    return notes


class OnnxModel(FileModel):
    """An ONNX file, answering in ONNX Runtime on the CPU, called as the model was.

    Args:
        path: the ONNX file.
        threads: of ONNX Runtime; by default as many as PyTorch uses, so that the two can be compared.
        optimized: a file to write the graph to that ONNX Runtime makes of it on this machine.

    Raises:
        ExportError: ONNX Runtime is not installed or cannot run the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        optimized: str | os.PathLike[str] | None = None,
    ) -> None:
        _need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors, which are raised as well; its warnings are about its own optimizer
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
        try:
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class of their own
            reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?", "", str(error))
            raise ExportError(
                f"ONNX Runtime cannot run {os.path.basename(path)} on the CPU: {reason.strip()}. "
                "It has few operations in bfloat16 and float64: where the model is one, export model.float(), "
                "with half=True for a file in float16"
            ) from error
        inputs = session.get_inputs()
        written = session.get_modelmeta().custom_metadata_map.get(METADATA)
        super().__init__(
            path,
            {i.name: _dtype(i.type) for i in inputs},
            json.loads(written) if written else None,
            any(i.shape and isinstance(i.shape[0], str) for i in inputs),
        )
        self.session = session

    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        """What ONNX Runtime answers."""
        answers: Sequence[Any] = self.session.run(None, arrays)
        return answers


def naming(program: ExportedProgram) -> tuple[dict[str, Any], list[str], list[str]]:
    """How the program is called and answers, as JSON; the names of its input tensors; the names of its output tensors.

    Raises:
        ExportError: it returns something that is neither a tensor nor None.
    """
    signature = program.graph_signature
    arguments = [spec.arg for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    answers = [spec.arg for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    fixed = {a.name: repr(a.value) for a in arguments if isinstance(a, ConstantArgument)}
    inputs = [a.name for a in arguments if a.name not in fixed]
    if constants := [a.value for a in answers if isinstance(a, ConstantArgument) and a.value is not None]:
        raise ExportError(f"the model returns {constants[0]!r} beside its tensors, which a file cannot: leave it out")

    tree = program.call_spec.out_spec
    outputs: list[str] = []
    for name, answer in leaves(pytree.tree_unflatten(answers, tree)):
        if not isinstance(answer, ConstantArgument):
            name = name if name[:1].isalpha() else f"output_{name}".rstrip("_")
            while name in (*inputs, *outputs):
                name = f"{name}_output"
            outputs.append(name)
    call = {
        "arguments": [a.name for a in arguments],
        "fixed": fixed,
        "present": [not isinstance(a, ConstantArgument) for a in answers],
        "structure": _as_json(tree),
    }
    return call, inputs, outputs


def _as_json(tree: pytree.TreeSpec) -> str | None:
    try:
        return pytree.treespec_dumps(tree)
    except (NotImplementedError, TypeError):  # a container class that was registered without a name for files
        return None


def _strip(made: Any) -> None:
    """Take the exporter's notes out: source paths and traces, in a small model more bytes than the weights."""
    graph = made.graph
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in graph.initializers.values():  # whose values tell both as well
        value.type = value.shape = None


def _need(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ExportError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'featherweight[onnx]'")


def _dtype(onnx_type: str) -> torch.dtype:
    """The torch type of a type as ONNX Runtime writes it, such as ``tensor(float)``."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return {"float": torch.float32, "double": torch.float64}.get(name) or getattr(torch, name)


def _root(error: BaseException) -> str:
    """The first line of the error that all others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
