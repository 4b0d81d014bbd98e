"""A teacher's answers on disk, found again by what the sample is: of the same inputs it need not be asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.batch import Inputs, describe
from featherweight.errors import ArtifactError, TaskError
from featherweight.task import raw_bytes

# A cache that grows beyond this holds more than it can save.
LIMIT_BYTES = 8 << 30
_OURS = 0x46575443  # "FWTC" in the header of every file of ours: SQLite's application_id


class Cache:
    """Answers sample by sample, in an SQLite file that several processes may share.

    A sample is known by a hash of its contents, so that another augmentation of it is another sample, and never gets
    the wrong answer. Where no sample of a second epoch was seen in the first, the cache is of no use, and says so.

    Args:
        folder: where to keep the file.
        teacher: a hash of all that the answers depend on beside the sample.
        limit_bytes: how large it may grow.
    Raises:
        ArtifactError: the file is not ours, damaged, or cannot be opened.
    """

    def __init__(self, folder: str | os.PathLike[str], teacher: str, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path, self.limit_bytes = Path(folder) / f"teacher-{teacher[:16]}.sqlite", limit_bytes
        self.hits = self.misses = 0
        self._epochs, self._found = 0, False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._table = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            (owner,) = self._table.execute("PRAGMA application_id").fetchone()
            if owner not in (0, _OURS):
                raise ArtifactError(f"{self.path} is another program's file: give another folder")
            # A cache that is lost is made again, so nothing waits for the disk.
            for line in (f"application_id = {_OURS}", "journal_mode = WAL", "synchronous = OFF"):
                self._table.execute(f"PRAGMA {line}")
            self._table.execute("CREATE TABLE IF NOT EXISTS layouts (id INTEGER PRIMARY KEY, layout TEXT UNIQUE)")
            self._table.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, layout INTEGER, value BLOB) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise ArtifactError(f"{self.path} cannot be used as a cache ({error}): delete it") from error

    def begin_epoch(self) -> None:
        """Say that the data begins anew."""
        self._epochs += 1

    def get(self, keys: Sequence[bytes]) -> dict[str, Tensor] | None:
        """What the teacher answered to these samples; None where one is not known."""
        marks = ",".join("?" * len(keys))
        try:
            rows = self._table.execute(
                f"SELECT key, layout, value FROM answers WHERE key IN ({marks})", keys
            ).fetchall()
        except sqlite3.Error as error:
            raise ArtifactError(f"{self.path} is damaged ({error}): delete it") from error
        known = {key: value for key, _, value in rows}
        self._found = self._found or bool(known)
        if len(known) < len(set(keys)) or len({layout for _, layout, _ in rows}) != 1:
            self.misses += 1
            return None
        self.hits += 1
        (text,) = self._table.execute("SELECT layout FROM layouts WHERE id = ?", (rows[0][1],)).fetchone()
        return _unpacked([known[key] for key in keys], json.loads(text))

    def put(self, keys: Sequence[bytes], answer: Mapping[str, Tensor]) -> None:
        """Keep what the teacher answered.

        Raises:
            TaskError: the answers are not one for each sample, or the cache is of no use, or too large.
        """
        if self._epochs > 1 and not self._found:
            raise TaskError(
                "none of the inputs came again in the second epoch: the data is augmented anew each time, and answers "
                "that are kept would never be used. Leave cache= out, so that the teacher answers what the student sees"
            )
        for name, tensor in answer.items():
            if not tensor.ndim or tensor.shape[0] != len(keys):
                raise TaskError(
                    f"the teacher's {name} is {describe(tensor)} for {len(keys)} samples, not one row for each: "
                    "such answers cannot be kept; leave cache= out"
                )
        layout = {name: [str(t.dtype).removeprefix("torch."), list(t.shape[1:])] for name, t in sorted(answer.items())}
        rows = [b"".join(raw_bytes(answer[name][n]) for name in layout) for n in range(len(keys))]
        if self.path.stat().st_size + sum(map(len, rows)) > self.limit_bytes:
            raise TaskError(
                f"{self.path} would grow beyond {self.limit_bytes / 1e9:.1f} GB: the answers are large, or the data is "
                "augmented anew each time. Leave cache= out"
            )
        text = json.dumps(layout)
        self._table.execute("INSERT OR IGNORE INTO layouts (layout) VALUES (?)", (text,))
        (number,) = self._table.execute("SELECT id FROM layouts WHERE layout = ?", (text,)).fetchone()
        self._table.execute("BEGIN")
        entries = [(key, number, row) for key, row in zip(keys, rows, strict=True)]
        self._table.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", entries)
        self._table.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._table.close()


def keys_of(inputs: Inputs) -> list[bytes]:
    """A hash of every sample's contents."""
    count = inputs.batch_size
    each: list[Tensor] = []
    common = hashlib.blake2b(digest_size=16)
    for tensor in inputs.tensors():
        if tensor.ndim and tensor.shape[0] == count:
            each.append(tensor.detach().cpu().contiguous())
            common.update(describe(tensor[0]).encode())
        else:
            common.update(describe(tensor).encode() + raw_bytes(tensor))
    plain: list[Any] = [v for v in (*inputs.args, *inputs.kwargs.items()) if isinstance(v, str | int | float | bool)]
    common.update(repr((sorted(inputs.kwargs), plain)).encode())
    rows = [tensor.reshape(count, -1).view(torch.uint8).numpy() for tensor in each if tensor.numel()]
    keys = []
    for n in range(count):
        digest = common.copy()
        for row in rows:
            digest.update(row[n].data)
        keys.append(digest.digest())
    return keys


def _unpacked(rows: Sequence[bytes], layout: Mapping[str, Any]) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, (kind, shape) in layout.items():
        dtype = getattr(torch, kind)
        size = torch.Size(shape).numel() * dtype.itemsize
        joined = bytearray(b"".join(row[start : start + size] for row in rows))
        found[name] = torch.frombuffer(joined, dtype=dtype).reshape(len(rows), *shape)
        start += size
    return found
