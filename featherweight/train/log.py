"""What a training says of itself on the way: to TensorBoard, or to a function of the user's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from featherweight.errors import FeatherweightError

Write = Callable[[str, float, int], None]
Log = str | os.PathLike[str] | Write | None


@contextmanager
def writing(log: Log) -> Iterator[Write]:
    """A function (name, value, step) that writes where it was asked to.

    Args:
        log: a folder for TensorBoard, a function that is called as it is, or None to write nowhere.
    Raises:
        FeatherweightError: tensorboard is missing.
    """
    if log is None:
        yield lambda name, value, step: None
        return
    if not isinstance(log, str | os.PathLike):
        yield log
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FeatherweightError(
            "log=folder needs tensorboard: pip install 'featherweight[tensorboard]', or give a function"
        ) from error
    writer = SummaryWriter(os.fspath(log))
    try:
        yield writer.add_scalar
    finally:
        writer.close()
