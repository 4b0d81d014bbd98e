"""Files of safetensors smaller, to the last bit, and back: whatever model they are of, tensor by tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from featherweight import artifact
from featherweight.code import tensors
from featherweight.code.container import Entry, Writer
from featherweight.code.tensors import Coding
from featherweight.errors import ArtifactError, did_you_mean
from featherweight.progress import track
from featherweight.task import raw_bytes

Where = str | os.PathLike[str]

# What safetensors calls the types.
NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_METADATA = "__metadata__"


def pack(source: Where, target: Where, *, coding: Coding = "small") -> int:
    """Write the tensors of a safetensors file to a smaller .fw file, from which `unpack` gives them back bit by bit.

    One tensor is in memory at a time. `featherweight.load` reads such a file into a model, `featherweight.open` tensor
    by tensor.

    Args:
        source: a safetensors file.
        target: the file to write, all or nothing.
        coding: ``small``, or ``fast`` where files of whole numbers are to be packed quickly; floats are packed alike.
    Returns:
        The file's size in bytes.
    Raises:
        ArtifactError: the source is no whole safetensors file, or the target cannot be written.
    """
    if coding not in tensors.CODINGS:
        hint = did_you_mean(str(coding), tensors.CODINGS)
        raise ArtifactError(f"coding is {coding!r}: it is one of {', '.join(tensors.CODINGS)}{hint}")
    source = Path(source)
    if not source.is_file():
        raise ArtifactError(f"there is no file {source}")
    try:
        with safe_open(source, framework="pt") as file:
            about = {"metadata": found} if (found := file.metadata()) else {}
            writer = Writer(target)
            try:
                for name in track(_in_order(source), "packing"):
                    tensor = file.get_tensor(name)
                    stream = tensors.encode(tensor, coding)
                    writer.add(Entry.of(stream, name, tensor.dtype, tuple(tensor.shape)), stream)
                return writer.finish(about)
            finally:
                writer.close()
    except SafetensorError as error:
        raise ArtifactError(f"{source} is truncated, damaged, or no safetensors file ({error})") from error
    except OSError as error:
        raise ArtifactError(f"{target} could not be written ({error}); what was there before is still there") from error


def unpack(source: Where, target: Where) -> int:
    """Write the tensors of a .fw file to a safetensors file: what was packed as it was, a model's as plain weights.

    One tensor is in memory at a time.

    Args:
        source: a file that `pack` or `Compressed.save` wrote.
        target: the file to write, all or nothing.
    Returns:
        The file's size in bytes.
    Raises:
        ArtifactError: the source is missing, foreign, newer, truncated or damaged, or the target cannot be written.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with artifact.open(source) as file:
        try:
            try:
                with open(temporary, "wb") as written:
                    written.write(_header(file))
                    for name in track(list(file), "unpacking"):
                        written.write(raw_bytes(file[name]))
                    written.flush()
                    os.fsync(written.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"{target} could not be written ({error}); what was there before is still there"
            ) from error
    return target.stat().st_size


def _in_order(source: Path) -> list[str]:
    """The names of a safetensors file's tensors in the order in which their bytes lie."""
    with open(source, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop(_METADATA, None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def _header(file: artifact.Opened) -> bytes:
    """The header of a safetensors file, as its own library writes it.

    Raises:
        ArtifactError: a tensor is of a type that such files do not have.
    """
    header: dict[str, Any] = {_METADATA: dict(file.metadata)} if file.metadata else {}
    offset = 0
    for name in file:
        dtype, shape = file.kind(name)
        if dtype not in NAMES:
            kind = str(dtype).removeprefix("torch.")
            raise ArtifactError(f"{file.path} holds {name!r} in {kind}, which safetensors files do not have")
        size = dtype.itemsize
        for length in shape:
            size *= length
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
