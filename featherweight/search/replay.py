"""Evaluating a network with one layer changed. Interim: without replay yet."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from featherweight import edits


class Replay:
    """A working copy of a network, one layer of which can be changed at a time."""

    def __init__(self, model: nn.Module, inputs: Any = None, limit: int = 1 << 30) -> None:
        self._model = copy.deepcopy(model)

    @contextmanager
    def changed(self, edit: edits.Replace) -> Iterator[nn.Module]:
        """The working copy with that layer replaced."""
        layer = edits.find(self._model, edit.layer)
        edit.apply(self._model)
        try:
            yield self._model
        finally:
            edits.put(self._model, edits.find(self._model, edit.layer), layer)
