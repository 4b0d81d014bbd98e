"""A model as a Core ML package (an ML program), and on macOS such a package as a module that answers in Core ML.

Compressed weights are written in the forms that Core ML has for them (`featherweight.export.packed`), and decompressed
where the package is compiled or run. Core ML runs on Apple's systems only: elsewhere a package is opened again and
looked through instead. coremltools is documented at apple.github.io/coremltools.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import logging
import os
import platform
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from featherweight.errors import ExportError
from featherweight.export.calling import METADATA, FileModel
from featherweight.export.onnx import naming
from featherweight.export.packed import BLOB, Packed, blobs, close, pack
from featherweight.export.program import first_line, has_dynamic_batch, quiet
from featherweight.forms import Rounded, constrained_tensors, constraints_on, released

MOST_BATCH = 128  # Core ML wants an upper end for every length that may vary
SYSTEMS = {16: "iOS 16 or macOS 13", 18: "iOS 18 or macOS 15"}
_DTYPES = {65568: torch.float32, 65552: torch.float16, 65600: torch.float64, 131104: torch.int32}  # ArrayFeatureType

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Plan:
    """How a model's numbers are written.

    Attributes:
        half: whether to compute in float16.
        packed: of every confined tensor, by name, the form it gets; None where none of Core ML's is smaller.
        rounded: how many activations the model rounds, and the file does not.
    """

    half: bool = False
    packed: Mapping[str, Packed | None] = field(default_factory=dict)
    rounded: int = 0


def runs_here() -> bool:
    """Whether this system has Core ML."""
    return platform.system() == "Darwin"


def prepare(model: nn.Module, half: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model to capture, of ordinary tensors and without rounded activations, and what else `write` takes."""
    plain = released(model)
    names = [name for name, module in model.named_modules() if isinstance(module, Rounded)]
    if names and plain is model:
        plain = copy.deepcopy(model)
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(path), leaf, nn.Identity())
    ordinary = dict(plain.named_parameters(remove_duplicate=False)) | dict(plain.named_buffers(remove_duplicate=False))
    packed: dict[str, Packed | None] = {}
    for path, module, leaf in constrained_tensors(model):
        tensor = getattr(module, leaf).detach().cpu()
        small = half or tensor.dtype == torch.float16
        made = pack(tensor.float().numpy(), constraints_on(module, leaf)[-1], half=small)
        own = ordinary[f"{path}.{leaf}".removeprefix(".")]
        packed |= {name: made for name, other in ordinary.items() if other is own}
    return plain, {"plan": Plan(half, packed, len(names))}


def write(program: ExportedProgram, path: Path, *, plan: Plan | None = None) -> tuple[str, ...]:
    """Write a captured program to `path`, a package for Core ML, open it again and see that it holds the model.

    Every weight that is found in the package under its name has to have the model's values, decompressed as
    coremltools does, every compressed one has to be found, and the weight file may not be larger than the bits say.

    Args:
        program: the model, as `featherweight.export.program.capture` gives it.
        path: the package to write, a folder that ends in .mlpackage.
        plan: as `prepare` gives it.
    Returns:
        What the reader of the file should know, a sentence each.

    Raises:
        ExportError: an operation has no counterpart in Core ML, `path` has another ending, coremltools is missing, or
            the package does not hold the model.
    """
    _need()
    if path.suffix != ".mlpackage":
        raise ExportError(f"Core ML's packages end in .mlpackage: name it {path.stem}.mlpackage")
    plan = plan or Plan()
    call, inputs, outputs = naming(program)
    if any(_value(program, tensor).dtype == torch.bfloat16 for _, tensor in _tensors(program)):
        raise ExportError("Core ML has no bfloat16: export model.float(), with half=True for float16")
    release = max((form.release for form in plan.packed.values() if form is not None), default=16)
    with quiet(), _talk_less():
        import coremltools as ct

        target = {16: ct.target.iOS16, 18: ct.target.iOS18}[release]
        settings = {"minimum_deployment_target": target, "skip_model_load": True}
        try:
            program = program.run_decompositions({})
            between = ct.convert(
                program,
                convert_to="milinternal",
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=ct.PassPipeline.EMPTY,
                inputs=[
                    ct.TensorType(name, _shape(value)) for name, value in zip(inputs, _given(program), strict=True)
                ],
                outputs=[ct.TensorType(name) for name in outputs],
                **settings,
            )
            kept = _put(between, {name: plan.packed.get(tensor) for name, tensor in _tensors(program)}, release)
            precision = ct.precision.FLOAT16 if plan.half else ct.precision.FLOAT32
            made = ct.convert(between, convert_to="mlprogram", compute_precision=precision, **settings)
            made.user_defined_metadata[METADATA] = json.dumps(call)
            made.save(os.fspath(path))
            shutil.rmtree(made.package_path)  # its own, which it would keep until the process ends
        except Exception as error:  # its exceptions have no common class of their own
            size, remedy = "", ""
            if has_dynamic_batch(program):  # which of its errors come of that, they do not say in one way
                size = " for batches of any size"
                remedy = "; dynamic_batch=False asks for the example's size only, which may work"
            raise ExportError(f"coremltools cannot convert the model{size}: {first_line(error)}{remedy}") from error
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # of the conversion, for its debugger
        notes = list(_checked(path, program, plan, kept, inputs, outputs))
    if plan.rounded:
        notes.append(f"{plan.rounded} activations that the model rounds are computed in floating point")
    if any(value.dtype == torch.int64 for value in _given(program)):
        notes.append("whole numbers go in as int32")
    if has_dynamic_batch(program):
        notes.append(f"takes batches of 1 to {MOST_BATCH}")
    notes.append(f"needs {SYSTEMS[release]}")
    if not runs_here():
        notes.append("checked structurally, not run: Core ML is on Apple's systems only")
    return tuple(notes)


class CoreMLModel(FileModel):
    """A Core ML package, answering in Core ML, called as the model was. On macOS only.

    Args:
        path: the package.

    Raises:
        ExportError: this is not macOS, or coremltools is missing, or Core ML cannot run the package.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        _need()
        if not runs_here():
            raise ExportError(f"{os.path.basename(path)} cannot be run here: Core ML is on Apple's systems only")
        with _talk_less():
            import coremltools as ct

            try:
                model = ct.models.MLModel(os.fspath(path))
                described = model.get_spec().description
            except Exception as error:  # its exceptions have no common class of their own
                raise ExportError(f"Core ML cannot run {os.path.basename(path)}: {first_line(error)}") from error
        kinds = {given.name: given.type.multiArrayType for given in described.input}
        call = model.user_defined_metadata.get(METADATA)
        super().__init__(
            path,
            {name: _DTYPES[kind.dataType] for name, kind in kinds.items()},
            json.loads(call) if call else None,
            any(size.lowerBound != size.upperBound for kind in kinds.values() for size in kind.shapeRange.sizeRanges),
        )
        self.model, self.outputs = model, [answer.name for answer in described.output]

    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        """What Core ML answers."""
        whole = {name: array if array.dtype.kind == "f" else array.astype(np.int32) for name, array in arrays.items()}
        found = self.model.predict(whole)
        return [np.asarray(found[name]) for name in self.outputs]


def reopened(path: Path) -> tuple[Any, Any]:
    """What a package says of itself (``Model_pb2``), and its program, both read from disk again."""
    with _talk_less():
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        model = ct.models.MLModel(os.fspath(path), skip_model_load=True)
        spec = model.get_spec()
        return spec, load(spec, spec.specificationVersion, model.weights_dir)


# Writing --------------------------------------------------------------------------------------------------------------


def _put(program: Any, forms: Mapping[str, Packed | None], release: int) -> list[str]:
    """Write compressed weights in the place of constants, in place; returns the names of those that were there."""
    from coremltools.converters.mil.mil import Builder
    from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource

    block = program.functions["main"]
    # Programs out of torch.export have to say of every operation where it comes from.
    where = [ScopeInfo(s, [None]) for s in (ScopeSource.EXIR_STACK_TRACE, ScopeSource.EXIR_DEBUG_HANDLE)]
    put = []
    for operation in list(block.operations):
        old = operation.outputs[0] if operation.op_type == "const" else None
        form = forms.get(old.name) if old is not None else None
        if old is None or form is None or not old.child_ops:
            continue
        with block, Builder.scope(*where):
            new = _constexpr(form, old, release, before_op=operation)
        block.replace_uses_of_var_after_op(anchor_op=operation, old_var=old, new_var=new)
        block.remove_ops([operation])
        put.append(old.name)
    return put


def _constexpr(form: Packed, old: Any, release: int, **where: Any) -> Any:
    """The operation that decompresses a weight."""
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    kind, name, shape = old.val.dtype, old.name, old.val.shape

    def whole(codes: Array, bits: int, signed: bool = False) -> Array:
        made = types.nptype_from_builtin(types.string_to_builtin(f"{'' if signed else 'u'}int{bits}"))
        return codes.astype(made)

    table = None if form.table is None else form.table.astype(kind)
    scale = None if form.scale is None else form.scale.astype(kind)
    signed = form.scale is not None and min(int(form.codes.min(initial=0)), _least(form.offset)) < 0
    codes = whole(form.codes, form.bits, signed) if form.bits else form.codes.astype(kind)
    kept = np.zeros(0, bool) if form.mask is None else form.mask
    offset = None if form.offset is None else whole(form.offset, form.bits, signed)
    if release < 18:
        sizes = np.array(shape, np.uint32)
        if table is not None:
            return mb.constexpr_lut_to_dense(
                indices=_bits(codes, form.bits), lut=table.ravel(), shape=sizes, name=name, **where
            )
        if scale is not None:
            axis = next((axis for axis, many in enumerate(scale.shape) if many > 1), 0)
            each = scale.ravel() if scale.size > 1 else scale.reshape(())
            zero = np.zeros(each.shape, codes.dtype) if offset is None else offset.reshape(each.shape)
            return mb.constexpr_affine_dequantize(
                quantized_data=codes, scale=each, zero_point=zero, axis=np.int32(axis), name=name, **where
            )
        return mb.constexpr_sparse_to_dense(nonzero_data=codes, mask=_bits(kept, 1), shape=sizes, name=name, **where)
    lookup: dict[str, Any] = {} if table is None else {"lut": table}
    lookup |= {"vector_axis": np.int32(1)} if form.vector > 1 else {}
    affine: dict[str, Any] = {"scale": scale} | ({} if offset is None else {"offset": offset})
    if form.mask is None:
        if table is not None:
            return mb.constexpr_lut_to_dense(indices=codes, **lookup, name=name, **where)
        return mb.constexpr_blockwise_shift_scale(data=codes, **affine, name=name, **where)
    mask, left = whole(kept, 1), codes
    if table is not None:
        mask, left = mb.constexpr_lut_to_sparse(
            indices_mask=mask, indices_nonzero_data=codes, **lookup, name=f"{name}_left", **where
        )
    elif scale is not None:
        mask, left = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=codes, **affine, name=f"{name}_left", **where
        )
    return mb.constexpr_sparse_to_dense(nonzero_data=left, mask=mask, name=name, **where)


def _bits(codes: Array, bits: int) -> Array:
    """Whole numbers side by side in bytes, the first in the lowest bits."""
    each = (codes.astype(np.uint8).ravel()[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(each.ravel(), bitorder="little")


def _least(offset: Array | None) -> int:
    return 0 if offset is None else int(offset.min())


def _given(program: ExportedProgram) -> list[Tensor]:
    """The input tensors, without values."""
    kinds = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in kinds]
    return [value for value in values if isinstance(value, Tensor)]


def _answers(program: ExportedProgram) -> list[Tensor]:
    """The output tensors, without values."""
    kinds = {spec.arg.name for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT}
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    return [node.meta["val"] for node in output.args[0] if node is not None and node.name in kinds]


def _shape(value: Tensor) -> tuple[Any, ...]:
    """A shape as coremltools takes it, with a range for what may vary."""
    import coremltools as ct

    return tuple(size if isinstance(size, int) else ct.RangeDim(1, MOST_BATCH, default=1) for size in value.shape)


def _tensors(program: ExportedProgram) -> list[tuple[str, str]]:
    """Every parameter and buffer: what it is called in the program, and in the model."""
    signature = program.graph_signature
    return [*signature.inputs_to_parameters.items(), *signature.inputs_to_buffers.items()]


# Looking through what was written -------------------------------------------------------------------------------------


def _checked(
    path: Path, program: ExportedProgram, plan: Plan, kept: Sequence[str], inputs: list[str], outputs: list[str]
) -> Iterator[str]:
    """What is to be said of a package, read from disk again.

    Raises:
        ExportError: it does not hold the model.
    """
    spec, made = reopened(path)
    for side, names, values, said in (
        ("inputs", inputs, _given(program), spec.description.input),
        ("outputs", outputs, _answers(program), spec.description.output),
    ):
        if [each.name for each in said] != names:
            raise ExportError(f"{path.name} has the {side} {[each.name for each in said]}, and not {names}")
        for value, each in zip(values, said, strict=True):
            fixed = tuple(size if isinstance(size, int) else None for size in value.shape)
            shape = tuple(each.type.multiArrayType.shape)  # Core ML leaves it out of answers whose shape may vary
            if shape and (
                len(shape) != len(fixed) or any(f not in (None, s) for f, s in zip(fixed, shape, strict=True))
            ):
                raise ExportError(f"{path.name} has {each.name} of shape {shape}, and not {fixed}")

    plain, packed, other = _contents(made)
    compared, dense, unseen, kinds, parts = 0, 0, list[str](), Counter[str](), list[int]()
    for name, tensor in _tensors(program):
        value, form = _value(program, tensor), plan.packed.get(tensor)
        if not value.is_floating_point() or value.ndim == 0:
            continue
        half = plan.half or value.dtype == torch.float16
        dense += value.numel() * (2 if half else 4)
        expected = value.detach().cpu().float().numpy()
        held = packed if name in kept else plain
        named = _named(held, name)
        own = named is not None and named.shape == expected.shape
        # Of weights that are the same, coremltools keeps one; what it merges with others has other names.
        alike = [named] if named is not None and own else held.values()
        if any(close(one.astype(np.float32), expected, half=half) for one in alike):
            compared += 1
        elif own or name in kept:
            raise ExportError(f"{path.name} does not hold {tensor} as the model has it")
        else:
            unseen.append(tensor)
        if form is not None and name in kept:
            kinds[form.kind] += 1
            parts += form.parts(2 if half else 4) if own else ()
        elif tensor in plan.packed:
            reason = "Core ML has no smaller form of it" if form is None else "coremltools has taken it apart"
            yield f"{tensor} is written as plain numbers: {reason}"

    size = _weight_file(path).stat().st_size if _weight_file(path).exists() else 0
    most = BLOB + blobs((*parts, *other))
    if size > most:
        raise ExportError(f"{path.name} keeps its weights in {size} bytes, where {most} were expected")
    if kinds:
        yield f"compressed weights: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
    yield f"{size} bytes of weights, at most {most} expected; as plain numbers {dense}"
    if unseen:
        yield (
            f"{compared} weights have the model's values; {len(unseen)} are merged with others in the file, as batch "
            f"norms are, and could not be compared: {', '.join(unseen[:3])}{'…' if len(unseen) > 3 else ''}"
        )
    else:
        yield f"all {compared} weights have the model's values"


def _contents(program: Any) -> tuple[dict[str, Array], dict[str, Array], list[int]]:
    """Constants, decompressed weights, and the bytes of all arrays that are no part of compressed ones."""
    plain, packed, other = dict[str, Array](), dict[str, Array](), list[int]()
    for operation in program.functions["main"].operations:
        result = operation.outputs[0]
        if operation.op_type == "const" and isinstance(result.val, np.ndarray):
            plain[result.name] = result.val
            if not any(reader.op_type.startswith("constexpr_") for reader in result.child_ops):
                other.append(result.val.nbytes)
        elif operation.op_type.startswith("constexpr_") and len(operation.outputs) == 1:
            packed[result.name] = _decompressed(operation)
    return plain, packed, other


def _decompressed(operation: Any) -> Array:
    """A weight, decompressed by coremltools."""
    left = operation.nonzero_data.op if operation.op_type == "constexpr_sparse_to_dense" else None
    if operation.op_type == "constexpr_lut_to_dense" and "vector_axis" in operation.inputs:
        return _looked_up(operation, operation.indices.val)
    if left is not None and left.op_type == "constexpr_lut_to_sparse":
        mask = left.indices_mask.val
        codes = operation.decompress(left.indices_nonzero_data.val, mask)
        return np.asarray(np.where(mask != 0, _looked_up(left, codes), 0))
    return np.asarray(operation.materialized_val_inference())


def _looked_up(operation: Any, codes: Array) -> Array:
    """Indices looked up by coremltools in parts, for it makes a copy of the table for every index."""
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense as dense

    table = operation.lut.val
    axis = operation.vector_axis.val if operation.vector_axis is not None else None
    rows = len(codes) // len(table) if len(table) > 1 else 1  # of a table, none of which is cut
    step = rows * max(1, 2**24 // (rows * codes[0].size * table.shape[-2] * table.shape[-1]))
    parts = [
        dense.decompress(
            codes[at : at + step], table if len(table) == 1 else table[at // rows : (at + step) // rows], axis
        )
        for at in range(0, len(codes), step)
    ]
    return np.concatenate(parts)


def _named(values: Mapping[str, Array], name: str) -> Array | None:
    """What has a name of the program, or one that coremltools makes of it."""
    made = (name, f"{name}_to_fp16", f"{name}_cast_fp16", f"{name}_promoted")
    return next((values[each] for each in made if each in values), None)


def _value(program: ExportedProgram, tensor: str) -> Tensor:
    found = program.state_dict[tensor] if tensor in program.state_dict else program.constants[tensor]
    assert isinstance(found, Tensor)
    return found


def _weight_file(path: Path) -> Path:
    return path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def _need() -> None:
    if importlib.util.find_spec("coremltools") is None:
        raise ExportError("Core ML needs coremltools, not installed here: pip install 'featherweight[coreml]'")


@contextmanager
def _talk_less() -> Iterator[None]:
    """Leave out what coremltools logs and shows at every import and conversion, where nobody can act on it."""
    harmless = (
        "has not been tested with coremltools",  # of PyTorch: what comes of it is looked through
        "Minimum required version",  # of scikit-learn and others, which are not converted
        "Failed to load _ML",  # Core ML, where there is none
        "ERROR - converting",  # which it raises
        "down casted to int32",  # in the notes
        "Recklessly broadcast",  # lengths that it cannot see to be those of one batch
    )

    def worth_reading(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in harmless)

    logger = logging.getLogger("coremltools")
    logger.addFilter(worth_reading)
    from tqdm import tqdm

    shown = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(shown, disable=True)
    try:
        with warnings.catch_warnings():
            # coremltools asks its own deprecated registry
            warnings.filterwarnings("ignore", "Function _TORCH_OPS_REGISTRY", DeprecationWarning)
            warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)  # folders of its own
            yield
    finally:
        tqdm.__init__ = shown
        logger.removeFilter(worth_reading)
