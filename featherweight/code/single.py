"""Symbols under fixed tables as one stream of ranges, by constriction: for all that is too short for many lanes.

Bamler, Understanding entropy coding with asymmetric numeral systems, 2022, arxiv.org/abs/2201.01741, with its library
constriction, whose range coder keeps 64 bits of state and writes words of 32. It is given frequencies as probabilities,
which are exact in double precision, so every machine makes the same tables of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import constriction
import numpy as np
from numpy.typing import NDArray

from featherweight.code.numbers import Reader
from featherweight.errors import ArtifactError

if TYPE_CHECKING:
    from featherweight.code.lanes import Tables

Whole = NDArray[np.int64]


def encode(symbols: Whole, tables: Tables, contexts: Whole | None = None) -> bytes:
    """Symbols as bytes, those of one context after those of another; `decode` needs what `lanes.encode` needs."""
    if tables.frequencies.shape[1] == 1:
        return b""
    coder = constriction.stream.queue.RangeEncoder()
    for model, chosen in _contexts(tables, contexts):
        coder.encode(symbols[chosen].astype(np.int32), model)
    words: NDArray[np.uint32] = coder.get_compressed()
    return words.astype("<u4").tobytes().rstrip(b"\0")


def decode(data: Reader, count: int, tables: Tables, contexts: Whole | None = None) -> NDArray[np.uint16]:
    """The symbols back, (count,); reads all that is left of the data.

    Raises:
        ArtifactError: the data is no such stream.
    """
    if tables.frequencies.shape[1] == 1:
        data.end()
        return np.zeros(count, np.uint16)
    size = data.left
    raw = np.zeros(-(-size // 4) * 4, np.uint8)
    raw[:size] = np.frombuffer(data.take(size), np.uint8)
    coder = constriction.stream.queue.RangeDecoder(raw.view("<u4").astype(np.uint32))
    found = np.empty(count, np.uint16)
    for model, chosen in _contexts(tables, contexts):
        many = count if isinstance(chosen, slice) else len(chosen)
        try:
            found[chosen] = coder.decode(model, many)
        except AssertionError as error:
            raise ArtifactError("its numbers are no stream of ranges") from error
    return found


def _contexts(tables: Tables, contexts: Whole | None) -> list[tuple[Any, slice | NDArray[np.intp]]]:
    """A model, and where the symbols are that it is for: for each context that occurs."""
    shares = tables.frequencies / float(1 << tables.precision)
    if contexts is None:
        return [(constriction.stream.model.Categorical(shares[0], perfect=False), slice(None))]
    order, each = np.argsort(contexts, kind="stable"), np.bincount(contexts)
    ends = np.cumsum(each)
    return [
        (constriction.stream.model.Categorical(shares[row], perfect=False), order[ends[row] - each[row] : ends[row]])
        for row in each.nonzero()[0]
    ]
