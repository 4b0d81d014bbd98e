"""Reading text and JSON: a file that is missing or something else is said with its path."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from featherweight.errors import ArtifactError

Read = TypeVar("Read")


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a file in UTF-8.

    Args:
        path: the file.
        what: what it should be, for the message, such as ``a plan``.
    Raises:
        ArtifactError: it cannot be read, or is not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{os.fspath(path)} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{os.fspath(path)} is not {what}: it is not text ({error})") from error


def read_json(path: str | os.PathLike[str], what: str, parse: Callable[[Any], Read]) -> Read:
    """What a JSON file holds.

    Args:
        path: the file.
        what: what it should be, for the message, such as ``a plan``.
        parse: makes that of the data; raises ArtifactError where the data is something else.
    Raises:
        ArtifactError: the file cannot be read, is not JSON, or `parse` refused it.
    """
    try:
        data = json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{os.fspath(path)} is not {what}: it is not JSON ({error})") from error
    try:
        return parse(data)
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from error
