"""One file: a model's form as edits and its values, entropy-coded. No pickle, so loading runs no code.

Confined tensors are written as the whole numbers that their constraints make values of, masked ones as what is kept;
everything else to the last bit. `docs/format.md` says how; files of version 1, which were safetensors files, are read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from featherweight import edits as editing
from featherweight.batch import copied, describe
from featherweight.code import tensors
from featherweight.code.container import DTYPES, MAGIC, Entry, File, Writer
from featherweight.code.numbers import Reader
from featherweight.code.tensors import Coding
from featherweight.edits import Constrain, Edit
from featherweight.errors import ArtifactError, EditError, did_you_mean
from featherweight.forms import Constrained, Constraint, Masked, constrained_tensors, released
from featherweight.ledger import Ledger
from featherweight.mend import fold_batch_norms
from featherweight.task import raw_bytes

# Of version 1.
FORMAT = "featherweight"
# What a stream that was made to deceive can raise on its way through a decoder.
_BROKEN = (ArtifactError, EditError, ValueError, IndexError, OverflowError, MemoryError, RuntimeError, TypeError)
_PROCESSOR = torch.device("cpu")

Where = str | os.PathLike[str]


# Writing ----------------------------------------------------------------------------------------------------------


def save(
    path: Where,
    model: nn.Module,
    edits: Sequence[Edit],
    ledger: Ledger | None,
    example: Mapping[str, Any] | None = None,
    *,
    coding: Coding = "small",
    fold: bool = False,
    beneath: bool = False,
) -> int:
    """Write a compressed model to one file, all or nothing: an existing file survives every failure.

    Args:
        path: where to.
        model: the compressed model; its state dict is stored.
        edits: what gave it its form, in order.
        ledger: what was done to it; None leaves that out.
        example: a sketch of the inputs of one call.
        coding: ``small``, ``fast``, or ``huffman`` for comparison.
        fold: take batch norms' statistics into their weights first: see `fold_batch_norms`.
        beneath: also keep, to the last bit, what lies beneath constraints, as training needs it that is to go on as if
            it had not been interrupted. Otherwise the confined values take its place.
    Returns:
        The file's size in bytes.
    Raises:
        ArtifactError: the state holds something that cannot be stored, or the file cannot be written.
    """
    if coding not in tensors.CODINGS:
        hint = did_you_mean(str(coding), tensors.CODINGS)
        raise ArtifactError(f"coding is {coding!r}: it is one of {', '.join(tensors.CODINGS)}{hint}")
    if fold:
        model = copied(model)
        fold_batch_norms(model)
    state = model.state_dict()
    _check(state)
    same = _aliases(state)
    confined = {} if beneath else _confined(model)
    about: dict[str, Any] = {"edits": [edit.to_json() for edit in edits]}
    about |= {"example": example} if example else {}
    about |= {"same": same} if same else {}
    try:
        writer = Writer(path)
        try:
            places: dict[str, int] = {}
            # What is confined comes after what confines it, so that it can be read from front to back.
            for name in sorted((name for name in state if name not in same), key=lambda name: name in confined):
                writer.add(*_entry(name, state[name], confined.get(name), places, coding))
                places[name] = len(places)
            if ledger is not None:
                about["record"] = len(writer.entries)
                writer.add(*_record(ledger))
            return writer.finish(about)
        finally:
            writer.close()
    except OSError as error:
        raise ArtifactError(f"{path} could not be written ({error}); what was there before is still there") from error


def measured(
    model: nn.Module, edits: Sequence[Edit], ledger: Ledger | None, example: Mapping[str, Any], **options: Any
) -> int:
    """The bytes of the file that `save` would write."""
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "model.fw", model, edits, ledger, example, **options)


def check(model: nn.Module) -> None:
    """See whether a file could hold the model, before the work that is to be kept in it.

    Raises:
        ArtifactError: its state holds something that is no tensor, or one of a type that files do not have.
    """
    _check(model.state_dict())


def _check(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"the model's state holds {name!r}, a {type(value).__name__}: only tensors are stored")
        if value.dtype not in DTYPES or value.layout != torch.strided:
            kind = str(value.dtype if value.dtype not in DTYPES else value.layout).removeprefix("torch.")
            raise ArtifactError(f"the model's state holds {name!r}, a {kind} tensor: such are not stored")


@dataclass(frozen=True)
class _Confined:
    """How a tensor that constraints have to do with is written.

    Attributes:
        masks: names of the masks in the state dict.
        kept: where all of them keep values; None where there are none.
        by: the number of the parametrization that makes values of numbers; how many there are, where all together make
            them of nothing; None where the values themselves are written.
        values: what is written, of the tensor's shape: values, or numbers less those of zeros.
    """

    masks: tuple[str, ...]
    kept: Tensor | None
    by: int | None
    values: Tensor


def _confined(model: nn.Module) -> dict[str, _Confined]:
    """What is written in another way than to the last bit, by its name in the state dict; all of it comes back."""
    found: dict[str, _Confined] = {}
    for name, module, tensor in constrained_tensors(model):
        place = f"{name}.parametrizations.{tensor}" if name else f"parametrizations.{tensor}"
        held = list(cast(Any, module).parametrizations[tensor])
        if all(isinstance(constraint, Constrained) for constraint in held):  # and none of the user's own
            with torch.no_grad():
                found |= _of_tensor(place, held, cast(Any, module).parametrizations[tensor].original)
    return found


def _of_tensor(place: str, held: Sequence[Constrained], beneath: Tensor) -> dict[str, _Confined]:
    """A confined tensor's values, and of its constraints' buffers those that need not say again what a mask says."""
    if len(held) == 1 and not held[0].all_its_own and bool(beneath.count_nonzero()):
        # The most frequent case, and the least work: what lies beneath one constraint is confined itself.
        coded = _coded(held, beneath, None)
        if coded is not None:
            return {f"{place}.original": _Confined((), None, *coded)}
    value = made_of(beneath, held)
    masks = tuple(f"{place}.{number}.mask" for number, constraint in enumerate(held) if isinstance(constraint, Masked))
    kept = kept_places([constraint.mask for constraint in held if isinstance(constraint, Masked)], value.shape)
    if not torch.equal(beneath, value) and not torch.equal(made_of(value, held), value):
        return {}
    if masks and bool(value[~kept.to(value.device)].any()):
        return {}
    found = {}
    written = kept if masks else None
    of_nothing = any(constraint.all_its_own for constraint in held) or not bool(value.any())
    if of_nothing and torch.equal(made_of(torch.zeros_like(value), held), value):
        found[f"{place}.original"] = _Confined((), None, len(held), value)
    elif (coded := _coded(held, value, written)) is not None:
        found[f"{place}.original"] = _Confined(masks, written, *coded)
    elif masks:
        found[f"{place}.original"] = _Confined(masks, written, None, value)
    for number, constraint in enumerate(held) if masks else ():
        for name, buffer in constraint.named_buffers():
            fits = not isinstance(constraint, Masked) and buffer.numel() == value.numel()
            if fits and not buffer.is_floating_point() and not bool(buffer.flatten().cpu()[~kept.flatten()].any()):
                found[f"{place}.{number}.{name}"] = _Confined(masks, kept.reshape(buffer.shape), None, buffer)
    return found


def _coded(held: Sequence[Constrained], value: Tensor, kept: Tensor | None) -> tuple[int, Tensor] | None:
    """The topmost constraint that has numbers for the values, and these less those of zeros; None where none has."""
    zeros = torch.zeros_like(value)
    for place, constraint in reversed(list(enumerate(held))):
        numbers = constraint.numbers(value, zeros)
        if numbers is not None:
            again = constraint.numbered(numbers, zeros)
            exact = torch.equal(again, value)
            if not exact and kept is not None:
                exact = bool(((again == value).cpu() | ~kept).all())
            return (place, numbers) if exact else None
    return None


def made_of(value: Tensor, held: Sequence[Constrained]) -> Tensor:
    """What constraints, from the lowest up, make of a tensor."""
    for constraint in held:
        value = constraint(value)
    return value


def kept_places(masks: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Where all masks keep values, bool, of that shape; everywhere where there are none."""
    kept = torch.ones(shape, dtype=torch.bool)
    for mask in masks:
        kept &= mask.cpu()
    return kept


def _entry(
    name: str, tensor: Tensor, confined: _Confined | None, places: Mapping[str, int], coding: Coding
) -> tuple[Entry, bytes]:
    """A tensor's entry and stream.

    Args:
        name: of the tensor in the state dict.
        tensor: its values.
        confined: how else it is written; None for to the last bit.
        places: the numbers of the entries so far, by name, aliases among them.
        coding: how hard to try.
    """
    if confined is None:
        stream = tensors.encode(tensor, coding)
        return Entry.of(stream, name, tensor.dtype, tuple(tensor.shape)), stream
    stream = _stream(confined, coding)
    masks = tuple(places[mask] for mask in confined.masks)
    return Entry.of(stream, name, tensor.dtype, tuple(tensor.shape), masks, confined.by), stream


def _stream(confined: _Confined, coding: Coding) -> bytes:
    """What is written of a tensor that constraints have to do with."""
    if confined.values.is_floating_point():
        if confined.by is not None:  # the constraints make it of nothing
            return b""
        return tensors.encode(confined.values.cpu()[confined.kept], coding)
    kept = None if confined.kept is None else confined.kept.numpy()
    stream = tensors.encode_whole(confined.values.to(torch.int64).cpu().numpy(), coding, kept, 0)
    if stream is not None:
        return stream
    codes = confined.values.to("cpu", torch.int64)
    return tensors.encode(codes if confined.kept is None else codes[confined.kept], coding)


def _record(ledger: Ledger) -> tuple[Entry, bytes]:
    """The ledger's entry and stream: JSON, deflated. With its curves it is as long as a small network's weights."""
    packed = torch.frombuffer(bytearray(zlib.compress(json.dumps(ledger.to_json()).encode(), 9)), dtype=torch.uint8)
    stream = tensors.encode(packed, "huffman")
    return Entry.of(stream, "(record)", torch.uint8, tuple(packed.shape)), stream


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: name of the tensor that it is} for those that share one with a tensor before them."""
    same: dict[str, str] = {}
    at: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in at:
            same[name] = at[place]
        else:
            at[place] = name
    return same


# Reading --------------------------------------------------------------------------------------------------------------


def load(path: Where, into: nn.Module, dense: bool = False) -> tuple[nn.Module, list[Edit], Ledger, dict[str, Any]]:
    """A freshly made model in the file's form and with its values.

    Args:
        path: a file that `save` wrote, of this version or an earlier one.
        into: a model as it was before compression; its values do not matter. It is changed in place where it can be.
        dense: give plain tensors of the confined values, without the constraints.
    Returns:
        The model, the edits, the ledger (without steps where the file has none), and the sketch of an example.
    Raises:
        ArtifactError: the file is missing, foreign, newer, truncated or damaged, or is another model's.
    """
    if not isinstance(into, nn.Module):
        raise ArtifactError(f"into is {into!r}, no nn.Module: give a freshly made model, such as make_model()")
    with open(path) as file:
        ledger = file.ledger or Ledger(type(into).__name__, "", "nothing: the file was saved without its record")
        done = file.edits
        try:
            model = editing.replay(into, done)
        except EditError as error:
            raise ArtifactError(f"{path} is not a {type(into).__name__}'s: {error}") from error
        _check_fit(path, model, file)
        _fill(model, file)
        example = file.example
    if dense:
        model, done = released(model), [edit for edit in done if not isinstance(edit, Constrain)]
    return model, done, ledger, example


def _check_fit(path: Where, model: nn.Module, file: Opened) -> None:
    """All that keeps the values from fitting the model, at once."""
    expected = model.state_dict()
    stored = {name: f"{str(dtype).removeprefix('torch.')}{list(shape)}" for name, (dtype, shape) in file.stored.items()}
    problems = [f"{n} is missing in the file" for n in expected if n not in stored]
    problems += [f"{n} is only in the file" for n in stored if n not in expected]
    problems += [
        f"{n} is {stored[n]} in the file and {describe(t)} in the model"
        for n, t in expected.items()
        if n in stored and describe(t) != stored[n]
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ArtifactError(f"{path} does not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}")


def _fill(model: nn.Module, file: Opened) -> None:
    """Put a file's values into a model of its form, tensor by tensor."""
    state = model.state_dict()
    late = []
    with torch.no_grad():
        for name in file.stored:
            if name in file.aliases:
                continue
            if file.is_confined(name):
                late.append(name)  # its constraints come first
            else:
                state[name].copy_(file.tensor(name))
        held: dict[str, tuple[nn.Module, str]] = {}
        for module_name, module, tensor in constrained_tensors(model):
            place = f"{module_name}.parametrizations.{tensor}" if module_name else f"parametrizations.{tensor}"
            held[f"{place}.original"] = (module, tensor)
        for name in late:
            if name not in held:
                raise ArtifactError(f"{file.path} is not this model's: {name!r} is confined in it")
            module, tensor = held[name]
            held_there = list(cast(Any, module).parametrizations[tensor])
            state[name].copy_(file.confined(name, held_there, state[name].device))
    for name, module, tensor in constrained_tensors(model):
        held_here = cast(Any, module).parametrizations[tensor]
        try:
            for constraint in held_here:
                if isinstance(constraint, Constrained):
                    constraint.check(held_here.original.shape)
        except EditError as error:
            raise ArtifactError(f"{file.path} is damaged, or no version wrote it: {name!r}: {error}") from error


@dataclass
class Opened(Mapping[str, Tensor]):
    """A file's tensors by the names of a plain state dict, each decoded when it is asked for.

    A tensor that constraints confine goes by its own name, such as ``fc1.weight``, and comes with its confined values.

    Attributes:
        path: the file.
        edits: what gave the model its form, in order.
        ledger: what was done to it; None where the file was saved without.
        example: the sketch of the inputs of one call.
        stored: type and shape of everything in the model's state dict, by name.
        aliases: names of tensors that are another's, and whose.
        metadata: what `featherweight.pack` found beside the tensors of a safetensors file.
    """

    path: Path
    edits: list[Edit]
    ledger: Ledger | None
    example: dict[str, Any]
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    _file: File | None = field(default=None, repr=False)
    _tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _constraints: dict[str, list[Constrained]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._entries = {entry.name: entry for entry in self._file.entries} if self._file else {}
        self._names = {_plain(name): name for name in self.stored if not _is_inner(name, self.stored)}
        self._given: dict[str, list[Constraint]] = {}
        for edit in self.edits:
            if isinstance(edit, Constrain):
                self._given.setdefault(edit.layer, []).append(edit.constraint)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name, decoded anew each time.

        Raises:
            KeyError: there is none.
            ArtifactError: it is damaged.
        """
        inner = self._names[name]
        inner = self.aliases.get(inner, inner)
        if self.is_confined(inner) or inner.endswith(".original"):
            return self._dense(inner)
        return self.tensor(inner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The type and shape of the tensor of that name, which is not decoded for that."""
        return self.stored[self._names[name]]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # By the names of the model's own state dict

    def is_confined(self, name: str) -> bool:
        """Whether the tensor takes constraints to make out."""
        entry = self._entries.get(name)
        return entry is not None and name.endswith(".original") and bool(entry.kept or entry.coded is not None)

    def tensor(self, name: str) -> Tensor:
        """What is stored under a name that is not confined.

        Raises:
            ArtifactError: it is damaged.
        """
        if self._file is None:
            return self._tensors[name]
        entry = self._entries[name]
        with self._naming(name):
            stream = self._file.stream(entry)
            if entry.kept:
                kept = self._kept(entry).reshape(entry.shape)
                return torch.from_numpy(_whole(stream, entry.shape, kept)).to(entry.dtype)
            return tensors.decode(stream, entry.dtype, entry.shape)

    def confined(self, name: str, held: Sequence[Constrained], device: torch.device = _PROCESSOR) -> Tensor:
        """The values of a confined tensor.

        Args:
            name: of what lies beneath.
            held: its constraints with their values, from the lowest up.
            device: that these are on, and the values are to be.
        Raises:
            ArtifactError: it is damaged.
        """
        assert self._file is not None
        entry = self._entries[name]
        with self._naming(name), torch.no_grad():
            stream = self._file.stream(entry)
            zeros = torch.zeros(entry.shape, dtype=entry.dtype, device=device)
            if entry.coded == len(held) and entry.coded is not None:
                stream.end()
                return made_of(zeros, held)
            kept = self._kept(entry) if entry.kept else None
            if entry.coded is None:
                assert kept is not None
                zeros[kept.to(device)] = tensors.decode(stream, entry.dtype, (int(kept.sum()),)).to(device)
                return zeros
            constraint = held[entry.coded]
            value = constraint.numbered(torch.from_numpy(_whole(stream, entry.shape, kept)).to(device), zeros)
            return value if kept is None else torch.where(kept.to(device), value, zeros)

    def written(self, name: str) -> Tensor:
        """What the stream of that name holds: (n,) values, or whole numbers that a constraint makes values of."""
        if self._file is None:
            return self._tensors[name].flatten()
        entry = self._entries[name]
        if not self.is_confined(name):
            found = self.tensor(name).flatten()
            return found[self._kept(entry).flatten()] if entry.kept else found
        with self._naming(name):
            stream = self._file.stream(entry)
            kept = self._kept(entry) if entry.kept else None
            if entry.coded is None and kept is not None:
                return tensors.decode(stream, entry.dtype, (int(kept.sum()),))
            if not stream.left:
                return torch.zeros(0, dtype=torch.int64)
            numbers = torch.from_numpy(_whole(stream, entry.shape, kept))
            return numbers.flatten() if kept is None else numbers[kept]

    def sizes(self) -> dict[str, int]:
        """The bytes of every stream, by its name in the state dict; of the record, where there is one."""
        if self._file is None:
            return {name: tensor.numel() * tensor.element_size() for name, tensor in self._tensors.items()}
        return {entry.name: entry.bytes for entry in self._file.entries}

    @property
    def header(self) -> int:
        """The bytes before the first stream, less those of short streams that stand there."""
        if self._file is None:
            return self.bytes - sum(self.sizes().values())
        return self._file.start - sum(len(entry.inline or b"") for entry in self._file.entries)

    @property
    def bytes(self) -> int:
        """The file's size."""
        return self.path.stat().st_size

    def _kept(self, entry: Entry) -> Tensor:
        """Where an entry's masks keep values."""
        assert self._file is not None
        masks = [self._file.entries[number] for number in entry.kept]
        return kept_places([self.tensor(mask.name) for mask in masks], torch.Size(masks[0].shape))

    def _dense(self, name: str) -> Tensor:
        """The confined values of a tensor, with constraints made from the edits."""
        place = name.removesuffix(".original")
        if place not in self._constraints:
            self._constraints[place] = self._made(place)
        held = self._constraints[place]
        if self.is_confined(name):
            return self.confined(name, held)
        with torch.no_grad():
            return made_of(self.tensor(name), held)

    def _made(self, place: str) -> list[Constrained]:
        """The constraints of one tensor with their values."""
        layer, _, tensor = place.rpartition("parametrizations.")
        dtype, shape = self.stored[f"{place}.original"]
        given = self._given.get(layer.removesuffix("."), ())
        like = torch.zeros(shape, dtype=dtype)
        with self._naming(place):
            made = [constraint.blank(like) for constraint in given if constraint.tensor == tensor]
            for number, constraint in enumerate(made):
                for name, value in constraint.state_dict().items():
                    value.copy_(self.tensor(f"{place}.{number}.{name}"))
        return made

    def _naming(self, name: str) -> _Naming:
        return _Naming(self.path, name)


@dataclass(frozen=True)
class _Naming:
    """Says of what goes wrong in decoding in which tensor it did."""

    path: Path
    name: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _BROKEN) and not (isinstance(error, ArtifactError) and str(self.path) in str(error)):
            raise ArtifactError(f"{self.path} is damaged: {self.name!r} cannot be decoded: {error}") from error


def _whole(stream: Reader, shape: tuple[int, ...], kept: Tensor | None) -> Any:
    """The whole numbers of a stream as an int64 array, 0 where none was kept."""
    if kept is not None and stream.peek() == tensors.PLANES:  # they lie further apart than tables go
        placed = torch.zeros(shape, dtype=torch.int64)
        placed[kept] = tensors.decode(stream, torch.int64, (int(kept.sum()),))
        return placed.numpy()
    if stream.peek() == tensors.PLANES:
        return tensors.decode(stream, torch.int64, shape).numpy()
    return tensors.decode_whole(stream, shape, None if kept is None else kept.numpy())


def _plain(name: str) -> str:
    """A name in the state dict as it would be without constraints."""
    place, inner, tensor = name.rpartition("parametrizations.")
    return place + tensor.removesuffix(".original") if inner and tensor.endswith(".original") else name


def _is_inner(name: str, stored: Mapping[str, object]) -> bool:
    """Whether a name in the state dict is of a constraint's own values."""
    place, inner, rest = name.rpartition("parametrizations.")
    tensor = rest.partition(".")[0]
    return bool(inner) and f"{place}parametrizations.{tensor}.original" in stored and not rest.endswith(".original")


def open(path: Where) -> Opened:
    """Open a file to decode its tensors one by one, without a model: for such as are larger than the memory.

    Args:
        path: a file that `save` or `featherweight.pack` wrote.
    Returns:
        A mapping, to be closed or used in a ``with``.
    Raises:
        ArtifactError: the file is missing, foreign, newer, truncated or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            first = file.read(len(MAGIC))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if first[:4] != MAGIC[:4]:
        return _version1(path)
    opened = File.open(path)
    try:
        about = opened.about
        entries = [e for n, e in enumerate(opened.entries) if n != about.get("record")]
        same = dict(about.get("same", {}))
        stored = {entry.name: (entry.dtype, entry.shape) for entry in entries}
        stored |= {name: stored[source] for name, source in same.items()}
        edits = [editing.from_json(data) for data in about.get("edits", [])]
        ledger = None
        if "record" in about:
            record = opened.entries[about["record"]]
            with _Naming(path, "the record"):
                packed = raw_bytes(tensors.decode(opened.stream(record), torch.uint8, record.shape))
                ledger = Ledger.from_json(json.loads(_inflated(packed)))
        return Opened(path, edits, ledger, about.get("example", {}), stored, same, about.get("metadata", {}), opened)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        opened.close()
        raise ArtifactError(f"{path} is damaged, or no version wrote it: its header makes no sense") from error
    except BaseException:
        opened.close()
        raise


def _inflated(data: bytes) -> bytes:
    return zlib.decompress(data)


# Version 1: safetensors files with all the rest in their metadata -----------------------------------------------------


def _version1(path: Path) -> Opened:
    """A file of version 1, all checksums confirmed; its tensors are held in memory.

    Raises:
        ArtifactError: the file is foreign, newer, truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is truncated, damaged, or no Featherweight file ({error})") from error
    checksums = json.loads(metadata["checksums"])
    bad = [n for n in sorted({*found, *checksums}) if n not in found or checksums.get(n) != _checksum(found[n])]
    if bad:
        raise ArtifactError(f"{path} is damaged: {', '.join(bad[:5])} do not match their checksums; get the file again")
    same = json.loads(metadata["same"])
    found |= {name: found[source] for name, source in same.items()}
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    edits = [editing.from_json(data) for data in json.loads(metadata["edits"])]
    ledger = Ledger.from_json(json.loads(_inflated(base64.b85decode(metadata["ledger"]))))
    return Opened(path, edits, ledger, json.loads(metadata["example"]), stored, same, {}, None, found)


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} is a safetensors file, but none that Featherweight wrote")
    parts = {key: value for key, value in metadata.items() if key != "checksum"}
    if metadata.get("checksum") != hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest():
        raise ArtifactError(f"{path} is damaged: its metadata does not match its checksum; get the file again")


def _checksum(tensor: Tensor) -> str:
    """Of type, shape and values."""
    return hashlib.sha256(describe(tensor).encode() + raw_bytes(tensor)).hexdigest()
