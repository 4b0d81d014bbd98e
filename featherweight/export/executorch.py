"""A model as an ExecuTorch program (.pte), lowered to XNNPACK, and such files as a module that answers in ExecuTorch.

ExecuTorch is documented at docs.pytorch.org/executorch, its XNNPACK backend at
docs.pytorch.org/executorch/stable/backends-xnnpack.html. What XNNPACK does not compute, ExecuTorch does in portable
kernels, plain loops.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from featherweight.errors import ExportError
from featherweight.export.calling import METADATA, FileModel
from featherweight.export.decomposed import rewritten
from featherweight.export.onnx import naming
from featherweight.export.program import first_line, quiet
from featherweight.export.quantized import Marks

# Why a file takes the example's batch size only.
FIXED = "ExecuTorch plans its memory, and XNNPACK its shapes, when the file is written"

# Types by the numbers that programs have for them: executorch/runtime/core/portable_type/scalar_type.h.
_TYPES = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32,
    7: torch.float64, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip
_MULTIPLYING = ("Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected", "BatchMatrixMultiply")
_PORTABLE_MULTIPLYING = ("convolution", "mm", "bmm", "addmm", "linear")


def write(program: ExportedProgram, path: Path, *, marks: Marks | None = None) -> tuple[str, ...]:
    """Write a captured program to `path` as a .pte file, with all that XNNPACK can compute lowered to it.

    Args:
        program: the model, as `featherweight.export.program.capture` gives it, for one batch size.
        path: the file to write.
        marks: what of it is whole numbers, as `featherweight.export.quantized.marked` gives it.
    Returns:
        What the reader of the file should know, a sentence each: how many operations XNNPACK computes, and which not.

    Raises:
        ExportError: an operation has no counterpart in ExecuTorch or no kernel in its runtime, or a package is missing.
    """
    _need()
    call, inputs, _ = naming(program)
    with _calm():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        program, notes = rewritten(program, marks or {})
        try:
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                constant_methods={METADATA: json.dumps({**call, "inputs": inputs})},
            )
            data = edge.to_executorch().buffer
        except Exception as error:  # its exceptions have no common class of their own
            raise ExportError(f"ExecuTorch cannot take the model: {_reason(error)}") from error
        known = Runtime.get().operator_registry.operator_names
    path.write_bytes(data)
    found = operations(path)
    if unknown := sorted(set(found.portable) - set(known)):
        raise ExportError(f"ExecuTorch's runtime has no kernel for {', '.join(unknown)}, which the model needs")
    return (*notes, str(found))


@dataclass(frozen=True)
class Operations:
    """What a .pte file computes, and what with.

    Attributes:
        xnnpack: what XNNPACK computes, by kind; changes of type are none.
        portable: what ExecuTorch's own kernels compute, by their names.
        whole: how many of XNNPACK's multiply whole numbers.
        left: what multiplies in floating point, by kind.
    """

    xnnpack: Counter[str]
    portable: Counter[str]
    whole: int
    left: Counter[str]

    def __str__(self) -> str:
        rest = ", ".join(f"{count} {name.removeprefix('aten::')}" for name, count in sorted(self.portable.items()))
        total = self.xnnpack.total() + self.portable.total()
        return (
            f"XNNPACK computes {self.xnnpack.total()} of {total} operations"
            f"{f'; in portable kernels, which are slow: {rest}' if rest else ''}"
        )


def operations(path: Path) -> Operations:
    """What is computed by what, as the file itself has it.

    Raises:
        ExportError: ExecuTorch is missing, or the file is none of its programs.
    """
    _need()
    with _calm():
        from executorch.exir._serialize._program import deserialize_pte_binary

        try:
            program = deserialize_pte_binary(path.read_bytes()).program
        except Exception as error:
            raise ExportError(f"{path.name} is no ExecuTorch program: {first_line(error)}") from error
        plan = next(plan for plan in program.execution_plan if plan.name == "forward")
        graphs = [_graph(program.backend_delegate_data[d.processed.index].data) for d in plan.delegates]
    kernels = [i.instr_args for chain in plan.chains for i in chain.instructions]
    names = [plan.operators[kernel.op_index] for kernel in kernels if hasattr(kernel, "op_index")]
    portable = Counter(f"{o.name}.{o.overload}" if o.overload else o.name for o in names)
    left = Counter(o.name.removeprefix("aten::") for o in names if o.name.split("::")[1] in _PORTABLE_MULTIPLYING)
    xnnpack, whole = Counter[str](), 0
    for graph in graphs:
        types = dict(map(_type, graph["xvalues"]))
        for node in graph["xnodes"]:
            kind, data = node["xnode_union_type"].removeprefix("_").removeprefix("XNN"), node["xnode_union"]
            if kind == "Convert":
                continue
            xnnpack[kind] += 1
            if kind in _MULTIPLYING:
                read = types[data.get("filter_id", data.get("input2_id"))]
                if "int" in read:
                    whole += 1
                else:
                    left[f"{kind} in {read}"] += 1
    return Operations(xnnpack, portable, whole, left)


def _graph(data: bytes) -> dict[str, Any]:
    """XNNPACK's graph, as its delegate reads it out of the file."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "schema.fbs").write_bytes(_get_schema_bytes())
        (folder / "graph.bin").write_bytes(data[header.flatbuffer_offset :][: header.flatbuffer_size])
        _flatc_decompile(place, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        text = (folder / "graph.json").read_text(encoding="utf-8")
    # flatc writes infinite numbers, the ends of a ReLU, in its own way.
    found: dict[str, Any] = json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))
    return found


def _type(value: Mapping[str, Any]) -> tuple[int, str]:
    """A value's number and its type, such as ``fp32`` or ``qcint8``."""
    tensor = value["xvalue_union"]
    tensor = tensor.get("tensor_value", tensor)  # of quantized ones
    return tensor["id_out"], tensor["datatype"].removeprefix("xnn_datatype_")


class ExecuTorchModel(FileModel):
    """A .pte file, answering in ExecuTorch on the CPU, called as the model was.

    Args:
        path: the .pte file.
        threads: of ExecuTorch, for all of its programs in this process; by default as many as PyTorch uses.

    Raises:
        ExportError: ExecuTorch is not installed or cannot run the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        _need()
        try:
            with _calm():
                from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
                from executorch.runtime import Runtime

                _unsafe_reset_threadpool(threads or torch.get_num_threads())
                program = Runtime.get().load_program(Path(path))
                method = program.load_method("forward")
                written = program.load_method(METADATA) if METADATA in program.method_names else None
                call = json.loads(written.execute([])[0]) if written else None
        except Exception as error:  # its exceptions have no common class of their own
            raise ExportError(f"ExecuTorch cannot run {os.path.basename(path)}: {first_line(error)}") from error
        about = method.metadata
        tensors = range(about.num_inputs())
        names = call["inputs"] if call else [f"input_{index}" for index in tensors]
        positions = tensors if not call else [call["arguments"].index(name) for name in names]
        types = [_TYPES[about.input_tensor_meta(at).dtype()] for at in positions]
        super().__init__(path, dict(zip(names, types, strict=True)), call, dynamic_batch=False)
        self.method, self.kept = method, program  # a method does not keep its program

    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        """What ExecuTorch answers."""
        tensors = {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}
        given = [tensors[n] if n in tensors else ast.literal_eval(self.fixed[n]) for n in self.arguments]
        return [answer.numpy() for answer in self.method.execute(given) if answer is not None]


@contextmanager
def _calm() -> Iterator[None]:
    """Leave out what ExecuTorch and torchao warn of when they are imported, and leave logging as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    disabled = [logger.disabled for logger in loggers]
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, was in zip(loggers, disabled, strict=True):
                logger.disabled = was
            root.handlers[:] = handlers  # XNNPACK's partitioner configures the root logger
            root.setLevel(level)


def _reason(error: BaseException) -> str:
    """What the error that all others were raised from says, with the operation that it names."""
    while error.__cause__ is not None:
        error = error.__cause__
    if unknown := re.search(r"Operator (?:torch\._ops\.)?([\w.]+) is not in Core ATen", str(error)):
        return f"it has no operation {unknown[1]}"
    said = first_line(error)
    named = re.search(r"(torch\._ops\.|torch\.ops\.)?aten[.:]+[\w.]+", str(error))
    return said if named is None or named[0] in said else f"{said} ({named[0]})"


def _need() -> None:
    if importlib.util.find_spec("executorch") is None:
        raise ExportError("ExecuTorch is not installed here: pip install 'featherweight[executorch]'")
