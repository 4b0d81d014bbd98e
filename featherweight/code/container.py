"""The layout of a .fw file: a header that says all, then one stream a tensor, each with a checksum and found at once.

`docs/format.md` is the specification.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from featherweight.code import tensors
from featherweight.code.numbers import Reader, varint
from featherweight.errors import ArtifactError

# As PNG's: a first byte that no text has, line ends that a transfer as text would change.
MAGIC = b"\x89FW\r\n\x1a\n\0"
VERSION = 2

Where = str | os.PathLike[str]

# By their numbers in files: only ever added to.
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
_CODED, _KEPT = 64, 128  # added to a type's number
# Streams of up to so many bytes stand in the header, whose checksum they share.
INLINE = 16

# What deflate may refer to before the first byte of a header: words that most of them hold.
DICTIONARY = (
    b'"dtype": "int64", "shape": [64, "spread": [0.0, 1.0"args": [{"dtype": "float32", "shape": [1, "kwargs": {}'
    b'"example": {"ledger"record"metadata"same": {"edit": "Narrow", "narrowing": {"edit": "Replace", "layer": "'
    b'"form": {"form": "LowRank", "rank": "form": "Separable", "embeddings.decoder.encoder.classifier.0.features.'
    b"downsample.self_attn.q_proj.k_proj.v_proj.o_proj.mlp.gate_proj.up_proj.down_proj.layernorm.norm1.norm2."
    b"num_batches_tracked.running_mean.running_var.model.layers.0.blocks.layer1.0.conv1.bn1.head.fc1.fc2.fc."
    b'.parametrizations.bias.0.scale", ".parametrizations.bias.original", ".parametrizations.weight.0.mask", ".bias", '
    b'".weight", ".parametrizations.weight.1.scale", ".parametrizations.weight.0.scale", '
    b'".parametrizations.weight.original", "axis": null, "group": 0}}, {"edit": "Constrain", "layer": "'
    b'"constraint": {"form": "Mask", "tensor": "weight", "kept": "constraint": {"form": "Grid", "tensor": "bias", '
    b'"bits": 8, "symmetric": true, "signed": true, "axis": 0, "edits": [{"names": ["'
)
# Deflate makes no more of a byte.
_INFLATES = 1032


@dataclass(frozen=True)
class Entry:
    """One stream of a file.

    Attributes:
        name: of the tensor, as the model's state dict has it.
        dtype: its type.
        shape: its shape.
        kept: entries of masks: only the values that all of them keep are written, in order; the others are 0.
        coded: which parametrization of the tensor makes values of the numbers that are written; None where those are
            the values themselves.
        offset: where in the file the stream begins.
        size: bytes of the stream.
        checksum: CRC-32 of the stream.
        inline: the stream itself, where it is so short that it stands in the header.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: tuple[int, ...] = ()
    coded: int | None = None
    offset: int = 0
    size: int = 0
    checksum: int = 0
    inline: builtins.bytes | None = None

    @classmethod
    def of(
        cls,
        stream: builtins.bytes,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        kept: tuple[int, ...] = (),
        coded: int | None = None,
    ) -> Entry:
        """The entry of a tensor whose stream this is, before it has its place in a file."""
        if len(stream) <= INLINE:
            return cls(name, dtype, shape, kept, coded, inline=stream)
        return cls(name, dtype, shape, kept, coded, size=len(stream), checksum=zlib.crc32(stream))

    @property
    def values(self) -> int:
        """How many values the tensor has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes its stream has, in the header or behind it."""
        return self.size if self.inline is None else len(self.inline)


class Writer:
    """Collects streams beside the file that is to be, and puts all in its place at once.

    Args:
        path: the file to write.
    """

    def __init__(self, path: Where) -> None:
        self.path, self.entries = Path(path), list[Entry]()
        # Small ones never reach the disk; large ones lie where there must be room for them anyway.
        self._streams = tempfile.SpooledTemporaryFile(1 << 26, dir=str(self.path.parent))  # noqa: SIM115

    def add(self, entry: Entry, stream: bytes) -> None:
        """Add a tensor, its entry `Entry.of` its stream."""
        self.entries.append(entry)
        if entry.inline is None:
            self._streams.write(stream)

    def close(self) -> None:
        """Forget what was collected."""
        self._streams.close()

    def finish(self, about: Mapping[str, Any]) -> int:
        """Write the file, all or nothing: an existing one survives every failure.

        Args:
            about: what the header says beside the tensors, as JSON-ready data.
        Returns:
            The file's size in bytes.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                file.write(opening(about, self.entries))
                self._streams.seek(0)
                shutil.copyfileobj(self._streams, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())  # to the disk itself, so that a crash right after leaves the whole file
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        return self.path.stat().st_size


def opening(about: Mapping[str, Any], entries: Iterable[Entry]) -> bytes:
    """All that comes before the streams."""
    entries = list(entries)
    words = json.dumps({**about, "names": [entry.name for entry in entries]}, separators=(", ", ": ")).encode()
    table = bytearray()
    for entry in entries:
        flags = (_CODED if entry.coded is not None else 0) | (_KEPT if entry.kept else 0)
        table += bytes([DTYPES.index(entry.dtype) | flags]) + varint(len(entry.shape))
        table += b"".join(map(varint, entry.shape))
        if entry.kept:
            table += varint(len(entry.kept)) + b"".join(map(varint, entry.kept))
        if entry.coded is not None:
            table += varint(entry.coded)
        table += varint(entry.size) if entry.inline is None else varint(len(entry.inline)) + entry.inline
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    long = varint(len(words)) + words + table
    squeezed = squeezer.compress(long) + squeezer.flush()
    checksums = b"".join(entry.checksum.to_bytes(4, "little") for entry in entries if entry.inline is None)
    header = (
        bytes([VERSION])
        + varint(len(long))
        + varint(len(squeezed))
        + varint(len(checksums) // 4)
        + squeezed
        + checksums
    )
    return MAGIC + header + zlib.crc32(header).to_bytes(4, "little")


@dataclass
class File:
    """A file that is open for reading, its header read and found whole.

    Attributes:
        path: the file.
        about: what its header says beside the tensors.
        entries: its tensors, in order.
        start: how many bytes come before the first stream.
        size: of the file.
    """

    path: Path
    about: Mapping[str, Any]
    entries: tuple[Entry, ...]
    start: int
    size: int
    _file: IO[bytes] = field(repr=False)

    @classmethod
    def open(cls, path: Where) -> File:
        """Open a file and read its header.

        Raises:
            ArtifactError: it is missing, foreign, newer, truncated or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise ArtifactError(f"there is no file {path}")
        try:
            file = open(path, "rb")  # noqa: SIM115 - stays open
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return cls._opened(path, file)
        except BaseException:
            file.close()
            raise

    @classmethod
    def _opened(cls, path: Path, file: IO[bytes]) -> File:
        size = os.fstat(file.fileno()).st_size
        front = file.read(len(MAGIC) + 1 + 3 * 9)
        if front[: len(MAGIC)] != MAGIC:
            whole = len(front) >= len(MAGIC)
            raise ArtifactError(
                f"{path} is no Featherweight file, or its first bytes are damaged"
                if whole
                else f"{path} is truncated, damaged, or no Featherweight file: it has {size} bytes"
            )
        version = front[len(MAGIC)] if len(front) > len(MAGIC) else VERSION
        if version > VERSION:
            raise ArtifactError(
                f"{path} has format version {version}, and this Featherweight reads up to {VERSION}: "
                "upgrade with pip install -U featherweight"
            )
        try:
            numbers = Reader(front[len(MAGIC) + 1 :])
            before = numbers.left
            long, squeezed, count = (numbers.varint() for _ in range(3))
            begin = len(MAGIC) + 1 + before - numbers.left
            end = begin + squeezed + 4 * count
            if end + 4 > size:
                raise ArtifactError("it ends too early")
            file.seek(begin)
            rest = file.read(squeezed + 4 * count + 4)
            header = front[len(MAGIC) : begin] + rest[:-4]
            if zlib.crc32(header) != int.from_bytes(rest[-4:], "little") or version != VERSION:
                raise ArtifactError("it does not match its checksum")
            about, entries = _header(rest[:squeezed], long, rest[squeezed:-4], end + 4)
        except (ArtifactError, ValueError, KeyError, TypeError, zlib.error) as error:
            raise ArtifactError(
                f"{path} is truncated or damaged, in its header ({error}); get the file again"
            ) from error
        for entry in entries:
            if entry.offset + entry.size > size:
                raise ArtifactError(
                    f"{path} is truncated: of {entry.name!r} and what follows it, "
                    f"{entries[-1].offset + entries[-1].size - size} bytes are missing; get the file again"
                )
        expected = entries[-1].offset + entries[-1].size if entries else end + 4
        if size > expected:
            raise ArtifactError(f"{path} is damaged: behind its last tensor there are {size - expected} bytes more")
        return cls(path, about, entries, end + 4, size, file)

    def stream(self, entry: Entry) -> Reader:
        """The bytes of a tensor, found whole.

        Raises:
            ArtifactError: they are not what was written.
        """
        if entry.inline is not None:
            return Reader(entry.inline)
        self._file.seek(entry.offset)
        data = self._file.read(entry.size)
        if len(data) != entry.size or zlib.crc32(data) != entry.checksum:
            raise ArtifactError(
                f"{self.path} is damaged: {entry.name!r} does not match its checksum; get the file again"
            )
        return Reader(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _header(squeezed: bytes, long: int, checksums: bytes, offset: int) -> tuple[dict[str, Any], tuple[Entry, ...]]:
    """What a header says: the JSON without the names, and the entries."""
    if long > _INFLATES * len(squeezed) + 64:
        raise ArtifactError("it speaks of more than it can hold")
    inflater = zlib.decompressobj(-15, zdict=DICTIONARY)
    read = Reader(inflater.decompress(squeezed, long + 1))
    if read.left != long or not inflater.eof or inflater.unused_data:
        raise ArtifactError("it is not as long as it says")
    about = json.loads(bytes(read.take(read.varint())))
    names = about.pop("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError("its names make no sense")
    entries: list[Entry] = []
    checked = Reader(checksums)
    for name in names:
        kind = read.byte()
        if kind & 31 >= len(DTYPES) or kind & 32:
            raise ArtifactError(f"{name!r} is of a type that this version does not know")
        shape = tuple(read.varint() for _ in range(read.varint_to(64)))
        kept = tuple(read.varint_to(len(names) - 1) for _ in range(read.varint_to(64))) if kind & _KEPT else ()
        coded = read.varint() if kind & _CODED else None
        size, checksum, inline = read.varint(), 0, None
        if size <= INLINE:
            size, inline = 0, bytes(read.take(size))
        else:
            checksum = int.from_bytes(checked.take(4), "little")
        entries.append(Entry(name, DTYPES[kind & 31], shape, kept, coded, offset, size, checksum, inline))
        offset += size
    read.end()
    checked.end()
    for entry in entries:
        if any(entries[mask].dtype != torch.bool or entries[mask].values != entry.values for mask in entry.kept):
            raise ArtifactError(f"the masks of {entry.name!r} are none")
        if not entry.kept and (entry.coded is None or entry.bytes):
            tensors.check_size(entry.bytes, entry.values)
    return about, tuple(entries)
