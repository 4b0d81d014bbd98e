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
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from featherweight.batch import describe
from featherweight.errors import ExportError
from featherweight.export.program import first_line, has_dynamic_batch, quiet

ONE_FILE_BYTES = 1_500_000_000  # of weights; one protobuf message, which an ONNX file is, ends at 2 GiB
METADATA = "featherweight"  # the key, in the file, of what ONNX has no place for: how the model is called and answers


def session(path: str | os.PathLike[str], *, threads: int | None = None) -> OnnxModel:
    """An ONNX file as a module: `OnnxModel`."""
    return OnnxModel(path, threads=threads)


def write(program: ExportedProgram, path: Path, *, opset: int | None = None) -> None:
    """Write a captured program to `path` as one ONNX file with its weights inside.

    Inputs keep the names of the arguments of the model's `forward`; outputs are called ``output``, ``output_0``,
    ``output_1``, or after the keys of a dict. Weights of more than 1.5 GB do not fit inside: they go to a second file,
    named ``….onnx.data``, and a warning says so.

    Args:
        program: the model, as `featherweight.export.program.capture` gives it.
        path: the file to write.
        opset: version of ONNX's operators; by default the one PyTorch's exporter is written for.

    Raises:
        ExportError: an operation has no counterpart in ONNX, or not in this `opset`, or a package is missing.
    """
    _need("onnx", "onnxscript")
    call, inputs, outputs = _naming(program)
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
    if opset is not None and made.model.opset_imports[""] != opset:
        raise ExportError(
            f"the model cannot be written in opset {opset}, only in {made.model.opset_imports['']}: "
            "leave opset out, or choose a later one"
        )
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name  # the exporter renames an input that is also an output
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


class OnnxModel(nn.Module):
    """An ONNX file, answering in ONNX Runtime on the CPU, called as the model was.

    It takes tensors as positional or keyword arguments and returns tensors in the structure the model returned them in;
    files that others wrote, and structures JSON cannot hold, give a single tensor or a tuple. Floating-point inputs are
    brought to the type the file asks for. It has no parameters, no gradients, and no training mode.

    Args:
        path: the ONNX file.
        threads: of ONNX Runtime; by default as many as PyTorch uses, so that the two can be compared.

    Raises:
        ExportError: ONNX Runtime is not installed or cannot run the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        super().__init__()
        _need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors, which are raised as well; its warnings are about its own optimizer
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class of their own
            reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?", "", str(error))
            raise ExportError(
                f"ONNX Runtime cannot run {os.path.basename(path)} on the CPU: {reason.strip()}. "
                "It has few operations in bfloat16 and float64: where the model is one, export model.float()"
            ) from error
        self.inputs: dict[str, torch.dtype] = {i.name: _dtype(i.type) for i in self.session.get_inputs()}
        self.dynamic_batch = any(i.shape and isinstance(i.shape[0], str) for i in self.session.get_inputs())
        self.path = os.fspath(path)
        written = self.session.get_modelmeta().custom_metadata_map.get(METADATA)
        call = json.loads(written) if written else {"arguments": list(self.inputs), "fixed": {}, "structure": None}
        self.arguments: Sequence[str] = call["arguments"]
        self.fixed: Mapping[str, str] = call["fixed"]
        self.structure = pytree.treespec_loads(call["structure"]) if call["structure"] else None
        self.present: Sequence[bool] = call.get("present", ())
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ONNX Runtime answers.

        Raises:
            ExportError: the arguments are not the file's inputs, or set what was fixed when the file was written.
        """
        answers = [torch.from_numpy(array) for array in self.session.run(None, self._arrays(args, kwargs))]
        if self.structure is not None:
            tensors = iter(answers)
            return pytree.tree_unflatten([next(tensors) if there else None for there in self.present], self.structure)
        return answers[0] if len(answers) == 1 else tuple(answers)

    def _arrays(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays to run with, by input name: keywords by theirs, positional ones by the names left, in order."""
        given = dict(_leaves(dict(kwargs))) if kwargs else {}
        names = [name for name in self.arguments if name not in given]
        positional = pytree.tree_leaves(args)
        given |= zip(names, positional, strict=False)
        for name, value in given.items():
            absent = value is None and name not in self.fixed
            if name not in self.inputs and not absent and self.fixed.get(name) != repr(value):
                raise ExportError(f"{self._takes()}: {name}={_shown(value)} would need another export")
        if len(positional) > len(names):
            raise ExportError(f"{self._takes()}, but was given {len(positional)} positional arguments")
        if missing := [name for name in self.inputs if given.get(name) is None]:
            raise ExportError(f"{self._takes()}, but was not given {', '.join(missing)}")
        return {name: self._array(name, given[name]) for name in self.inputs}

    def _array(self, name: str, value: Any) -> Any:
        wanted = self.inputs[name]
        if not isinstance(value, Tensor):
            raise ExportError(f"{self._takes()}, but was given {name}={value!r}")
        if value.dtype != wanted and value.is_floating_point() and wanted.is_floating_point:
            value = value.to(wanted)
        return value.detach().cpu().numpy()

    def _takes(self) -> str:
        fixed = "".join(f", with {name}={value} fixed" for name, value in self.fixed.items())
        return f"{os.path.basename(self.path)} takes the tensors {', '.join(self.inputs)}{fixed}"


def _naming(program: ExportedProgram) -> tuple[dict[str, Any], list[str], list[str]]:
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
        raise ExportError(
            f"the model returns {constants[0]!r} beside its tensors, which an ONNX file cannot: leave it out"
        )

    tree = program.call_spec.out_spec
    outputs: list[str] = []
    for name, answer in _leaves(pytree.tree_unflatten(answers, tree)):
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


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Everything in nested containers, named by its keys: ``{"state": (h, c)}`` gives state_0 and state_1."""
    return [
        ("_".join(re.findall(r"\w+", pytree.keystr(path))), leaf)
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
    ]


def _shown(value: Any) -> str:
    return describe(value) if isinstance(value, Tensor) else repr(value)


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
