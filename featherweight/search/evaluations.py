"""Scores that outlive the run which measured them, so that no network is evaluated twice."""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from featherweight.errors import ArtifactError

_OURS = 0x46575431  # "FWT1" in the header of every file of ours: SQLite's application_id
_VERSION = 1


class Evaluations:
    """A table of scores by key: an SQLite file that several processes may share, or a table in memory.

    Every score is committed when it is put, so that a run that is killed loses only the evaluation it was in.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Open the file, or make it.

        Args:
            path: the file; None to keep the scores in memory.
        Raises:
            ArtifactError: the file is not ours, damaged, newer than this version, or cannot be opened; it is left.
        """
        self._path = None if path is None else Path(path)
        try:
            # Other processes hold the file for milliseconds: a minute of waiting for one means that something is wrong.
            self._table = sqlite3.connect(
                ":memory:" if self._path is None else self._path,
                timeout=60,
                isolation_level=None,  # every statement commits by itself
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            raise ArtifactError(f"{path} cannot be opened: {error}; does its folder exist?") from error
        self._close = weakref.finalize(self, self._table.close)
        try:
            self._open()
        except Exception:
            self._close()
            raise

    def get(self, key: str) -> float | None:
        """The score of this key; None where there is none."""
        row = self._run("SELECT score FROM evaluations WHERE key = ?", key).fetchone()
        return None if row is None else float(row[0])

    def put(self, key: str, score: float, note: str = "") -> None:
        """Keep a score, in the place of any that the key had.

        Args:
            key: see :func:`key`.
            score: a finite number.
            note: what was evaluated, in words, for whoever opens the file.
        Raises:
            ValueError: the score is not finite.
        """
        if not math.isfinite(score):
            raise ValueError(f"the score of {note or key} is {score}: only finite scores are kept")
        self._run("INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?)", key, float(score), note)

    def ask(self, key: str, compute: Callable[[], float], note: str = "") -> float:
        """The score that is kept for this key, or else the one that `compute` returns, which is kept from then on."""
        known = self.get(key)
        if known is not None:
            return known
        score = compute()
        self.put(key, score, note)
        return score

    def __len__(self) -> int:
        """How many scores there are."""
        return int(self._run("SELECT count(*) FROM evaluations").fetchone()[0])

    def close(self) -> None:
        """Let go of the file; also done when the object goes away."""
        self._close()

    def _open(self) -> None:
        # Nothing is written before the file is known to be ours or empty: not even the journal's mode.
        self._run("BEGIN IMMEDIATE" if self._is_empty() else "BEGIN")
        application = self._run("PRAGMA application_id").fetchone()[0]
        version = self._run("PRAGMA user_version").fetchone()[0]
        if self._is_empty():
            self._run("CREATE TABLE evaluations (key TEXT PRIMARY KEY, score REAL NOT NULL, note TEXT NOT NULL)")
            self._run(f"PRAGMA application_id = {_OURS}")
            self._run(f"PRAGMA user_version = {_VERSION}")
        elif application != _OURS:
            raise ArtifactError(f"{self._path} is a database, but none of evaluations: give another file")
        elif version != _VERSION:
            raise ArtifactError(
                f"{self._path} is of version {version}, and this is for version {_VERSION}: update featherweight"
            )
        self._run("COMMIT")
        # A table with a log beside it can be read while it is written. Either mode is right, so where another process
        # keeps the file busy just now, the mode stays.
        with suppress(sqlite3.OperationalError):
            self._table.execute("PRAGMA journal_mode = WAL")

    def _is_empty(self) -> bool:
        return not self._run("SELECT count(*) FROM sqlite_master").fetchone()[0]

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._table.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise ArtifactError(f"{self._path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ArtifactError(
                f"{self._path} is no table of evaluations, or damaged ({error}): give another file, or remove it"
            ) from error


def key(*parts: str) -> str:
    """The SHA-256 of these parts, in this order: whatever the score depends on belongs in them."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(f"{len(data)}:".encode() + data)  # with its length, so that ("ab", "c") is not ("a", "bc")
    return digest.hexdigest()
