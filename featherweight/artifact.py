"""One file: a model's form as JSON and its values as safetensors. No pickle, so loading runs no code.

The file is a safetensors file, readable by any tool that knows the format; what it was made by, the edits, the ledger
and checksums of every tensor and of all this stand in its metadata.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight import edits as editing
from featherweight.batch import describe
from featherweight.edits import Edit
from featherweight.errors import ArtifactError, EditError
from featherweight.ledger import Ledger
from featherweight.task import raw_bytes

FORMAT = "featherweight"
VERSION = 1

Where = str | os.PathLike[str]


def save(
    path: Where, model: nn.Module, edits: Sequence[Edit], ledger: Ledger, example: Mapping[str, Any] | None = None
) -> int:
    """Write a compressed model to one file, all or nothing: an existing file survives every failure.

    Args:
        path: where to.
        model: the compressed model; its state dict is stored.
        edits: what gave it its form, in order.
        ledger: what was done to it.
        example: a sketch of the inputs of one call.
    Returns:
        The file's size in bytes.
    Raises:
        ArtifactError: the state holds something that is no tensor, or the file cannot be written.
    """
    check(model)
    tensors, same = _distinct(model.state_dict())
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "edits": json.dumps([edit.to_json() for edit in edits]),
        "ledger": _packed(ledger.to_json()),
        "example": json.dumps(example or {}),
        "same": json.dumps(same),
        "checksums": json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()}),
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            temporary.touch()  # with the permissions that any new file gets here: safetensors gives its owner's only
            permissions = stat.S_IMODE(temporary.stat().st_mode)
            save_file(tensors, temporary, {**metadata, "checksum": _checksum_of(metadata)})
            temporary.chmod(permissions)
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} could not be written ({error}); what was there before is still there") from error
    return path.stat().st_size


def check(model: nn.Module) -> None:
    """See whether a file could hold the model, before the work that is to be kept in it.

    Raises:
        ArtifactError: its state holds something that is no tensor.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"the model's state holds {name!r}, a {type(value).__name__}: only tensors are stored")


def load(path: Where, into: nn.Module) -> tuple[nn.Module, list[Edit], Ledger, dict[str, Any]]:
    """A freshly made model in the file's form and with its values.

    Args:
        path: a file that `save` wrote.
        into: a model as it was before compression; its values do not matter. It is changed in place where it can be.
    Returns:
        The model, the edits, the ledger, and the sketch of an example.
    Raises:
        ArtifactError: the file is missing, foreign, newer, truncated or damaged, or is another model's.
    """
    if not isinstance(into, nn.Module):
        raise ArtifactError(f"into is {into!r}, no nn.Module: give a freshly made model, such as make_model()")
    metadata, tensors = read(path)
    ledger = Ledger.from_json(_unpacked(metadata["ledger"]))
    done = [editing.from_json(data) for data in json.loads(metadata["edits"])]
    try:
        model = editing.replay(into, done)
    except EditError as error:
        raise ArtifactError(f"{path} is not a {type(into).__name__}'s: {error}") from error
    state = {**tensors, **{name: tensors[source] for name, source in json.loads(metadata["same"]).items()}}
    _check_fit(path, model, state)
    model.load_state_dict(state)
    return model, done, ledger, json.loads(metadata["example"])


def read(path: Where) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A file's metadata and tensors, all checksums confirmed.

    Raises:
        ArtifactError: the file is missing, foreign, newer, truncated or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is truncated, damaged, or no Featherweight file ({error})") from error
    checksums = json.loads(metadata["checksums"])
    bad = [n for n in sorted({*tensors, *checksums}) if n not in tensors or checksums.get(n) != _checksum(tensors[n])]
    if bad:
        raise ArtifactError(f"{path} is damaged: {', '.join(bad[:5])} do not match their checksums; get the file again")
    return metadata, tensors


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} is a safetensors file, but none that Featherweight wrote")
    version = metadata.get("version", "")
    if version.isdecimal() and int(version) > VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, and this Featherweight reads up to {VERSION}: "
            "upgrade with pip install -U featherweight"
        )
    if metadata.get("checksum") != _checksum_of(metadata):
        raise ArtifactError(f"{path} is damaged: its metadata does not match its checksum; get the file again")


def _check_fit(path: Where, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """All that keeps the values from fitting the model, at once."""
    expected = model.state_dict()
    problems = [f"{n} is missing in the file" for n in expected if n not in state]
    problems += [f"{n} is only in the file" for n in state if n not in expected]
    problems += [
        f"{n} is {describe(state[n])} in the file and {describe(t)} in the model"
        for n, t in expected.items()
        if n in state and describe(t) != describe(state[n])
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ArtifactError(f"{path} does not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}")


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, contiguous, and {name: name of the tensor that it is} for those that share one."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    at: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in at:
            same[name] = at[place]
            continue
        at[place] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, same


def _checksum(tensor: Tensor) -> str:
    """Of type, shape and values."""
    return hashlib.sha256(describe(tensor).encode() + raw_bytes(tensor)).hexdigest()


def _checksum_of(metadata: Mapping[str, str]) -> str:
    """Of all metadata but the checksum itself."""
    parts = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _packed(data: Any) -> str:
    """JSON, deflated: a ledger with its curves is as long as a small network's weights, and repeats itself much."""
    return base64.b85encode(zlib.compress(json.dumps(data).encode(), 9)).decode()


def _unpacked(text: str) -> Any:
    return json.loads(zlib.decompress(base64.b85decode(text)))


def _flush(path: Path) -> None:
    """To the disk itself, so that a crash right after leaves the whole file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
