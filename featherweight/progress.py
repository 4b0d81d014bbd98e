"""Progress bars on whatever takes more than a second, and silence on whatever does not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

_enabled = True


def show(enabled: bool) -> None:
    """Switch progress bars on or off for the whole process; they are only ever drawn on a terminal."""
    global _enabled
    _enabled = enabled


def track(items: Iterable[T], doing: str, total: int | None = None) -> Iterator[T]:
    """The same items, with a bar once they have taken more than a second.

    Args:
        items: what to go through.
        doing: what is being done, in a few words, as the bar's label.
        total: how many there are, where `items` has no length of its own.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not (_enabled and sys.stderr.isatty()):
        yield from items
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    job = bar.add_task(doing, total=total)
    begun, drawn = time.monotonic(), False
    try:
        for item in items:
            yield item
            bar.advance(job)
            if not drawn and time.monotonic() - begun > 1.0:
                bar.start()
                drawn = True
    finally:
        bar.stop()
