"""Labels of slices: union-find over numbers, with products, in vectorised form.

Every index of every dimension of every tensor carries a set of labels, and its slice is kept as long as all of them
are: a row of an array (indices, factors) of label numbers, filled up with 0. Operations only join labels, split one
into two factors, or fix them. Joining more than necessary couples more than necessary; it never makes an answer
wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]  # (indices, factors) label numbers; 0 fills up

_FREE = np.iinfo(np.int64).max  # the reason of a label that is not fixed


@dataclass(frozen=True)
class Reason:
    """Why a slice can never go.

    Attributes:
        text: in plain words.
        where: the line of the user's code and the module; empty where there is none.
    """

    text: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


class Labels:
    """All labels of one network, and what is known of them.

    Every label comes from an `allocate` call, whose number is its family: labels of the same families stand for
    slices that play the same part.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, np.int64)
        self._factors = np.zeros((1024, 2), np.int64)
        self._why = np.full(1024, _FREE, np.int64)
        self._family = np.zeros(1024, np.int64)
        self._count = 1  # 0 is no label
        self.families: list[str] = [""]
        self.reasons: list[Reason] = []
        self._anchors: dict[Reason, int] = {}

    def __len__(self) -> int:
        return self._count

    def allocate(self, length: int, family: str) -> Rows:
        """New labels, one for each of `length` indices: (length, 1)."""
        first, self._count = self._count, self._count + length
        while self._count > len(self._parent):
            room = len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(room, np.int64)])
            self._factors = np.concatenate([self._factors, np.zeros((room, 2), np.int64)])
            self._why = np.concatenate([self._why, np.full(room, _FREE, np.int64)])
            self._family = np.concatenate([self._family, np.zeros(room, np.int64)])
        new = np.arange(first, self._count)
        self._parent[new] = new
        self._family[new] = len(self.families)
        self.families.append(family)
        return new[:, None]

    def fixed(self, length: int, reason: Reason) -> Rows:
        """Labels of indices that are always kept, for that reason: (length, 1)."""
        if reason not in self._anchors:
            anchor = self.allocate(1, "fixed")
            self._why[anchor] = self._reason_number(reason)
            self._anchors[reason] = int(anchor[0, 0])
        return np.full((length, 1), self._anchors[reason], np.int64)

    def resolve(self, rows: Rows) -> Rows:
        """Rows in canonical form: leaves in falling order, each once; an index that is always kept has only zeros."""
        leaves = self._leaves(rows)
        return _canonical(np.where(self._why[leaves] < _FREE, 0, leaves))

    def fix(self, rows: Rows, reason: Reason) -> None:
        """Never let the slices with any of these labels go."""
        leaves = np.unique(self._leaves(rows))
        leaves = leaves[leaves > 0]
        self._why[leaves] = np.minimum(self._why[leaves], self._reason_number(reason))

    def why(self, rows: Rows) -> list[Reason]:
        """The reasons for which any of these are always kept, each once, the earliest first."""
        numbers = np.unique(self._why[self._leaves(rows)])
        return [self.reasons[i] for i in numbers if i < _FREE]

    def join(self, one: Rows, other: Rows) -> None:
        """Let the slices of two dimensions of one length go together only.

        Raises:
            ValueError: the lengths differ.
        """
        if len(one) != len(other):
            raise ValueError(f"{len(one)} and {len(other)} labels cannot be joined")
        for _ in range(6):  # joining products may open new differences; it settles in two or three rounds
            a, b = self.resolve(one), self.resolve(other)
            a, b = _padded(a, b)
            differ = (a != b).any(1)
            if not differ.any():
                return
            self._settle(one[differ], other[differ], a[differ], b[differ])
        mixed = Reason("its slices meet slices of another grouping")
        self.fix(one, mixed)
        self.fix(other, mixed)

    def merge(self, outer: Rows, inner: Rows) -> Rows:
        """The labels of a dimension that runs over two, the first being the slower: (outer · inner, factors)."""
        a, b = self._known(outer), self._known(inner)
        return np.concatenate([np.repeat(a, len(b), 0), np.tile(b, (len(a), 1))], 1)

    def split(self, rows: Rows, outer: int, inner: int, family: str = "") -> tuple[Rows, Rows]:
        """The labels of the two dimensions that one of length outer · inner falls into, the first being the slower.

        Where slices could so far go one by one, each gets two labels: one of its outer and one of its inner index.
        Where they could not, every outer index keeps the same inner ones.
        """
        cells = self.resolve(rows).reshape(outer, inner, -1)
        first = self._common(cells)
        second = self._common(cells.transpose(1, 0, 2))
        if not cells.any():
            return self._fixed_like(rows, outer), self._fixed_like(rows, inner)
        made = _canonical(np.concatenate([np.repeat(first, inner, 0), np.tile(second, (outer, 1))], 1))
        made, flat = _padded(made, cells.reshape(outer * inner, -1))
        if (made == flat).all():
            return first, second
        families = self._family[cells[:, :, 0]]
        # parts that different layers made, put one after another, are no blocks of one thing: none of them goes as a
        # whole
        if cells.shape[2] == 1 and (cells > 0).all() and (families == families[0, 0]).all():
            # a dimension that something else was merged into holds the same rows (or columns) several times over
            once, row_of = np.unique(cells[:, :, 0], axis=0, return_inverse=True)
            once, column_of = np.unique(once, axis=1, return_inverse=True)
            if len(np.unique(once)) == once.size:
                rows_, columns = self._in_order(row_of), self._in_order(column_of)
                first = self.allocate(once.shape[0], f"{family}/outer")
                second = self.allocate(once.shape[1], f"{family}/inner")
                outer_, inner_ = first[rows_], second[columns]
                self._factors[cells[:, :, 0], 0] = outer_
                self._factors[cells[:, :, 0], 1] = inner_[:, 0]
                return outer_, inner_
        reason = Reason(f"a view splits it into {outer} × {inner}, across slices that go together")
        return self.fixed(outer, reason), self.tie(rows, outer, inner)

    def common(self, rows: Rows) -> Rows:
        """The labels that all indices share: (1, factors)."""
        return self._common(self.resolve(rows)[None])

    def tie(self, rows: Rows, outer: int, inner: int) -> Rows:
        """Let every outer index of a dimension keep the same inner ones: the labels of those, (inner, factors)."""
        first = rows[:inner]
        self.join(rows, np.tile(first, (outer, 1)))
        return first

    def leaves(self) -> tuple[Rows, Rows]:
        """Every label's leaf (labels,) and family (labels,), of those that are leaves and may go."""
        ids = np.arange(1, self._count)
        ids = ids[self._factors[self._find(ids), 0] == 0]
        roots = self._find(ids)
        free = self._why[roots] == _FREE
        return roots[free], self._family[ids[free]]

    def _settle(self, one: Rows, other: Rows, a: Rows, b: Rows) -> None:
        """One round of `join` on rows that differ: a and b are one and other, resolved."""
        only_a = _canonical(np.where((a[:, :, None] == b[:, None, :]).any(2), 0, a))
        only_b = _canonical(np.where((b[:, :, None] == a[:, None, :]).any(2), 0, b))
        in_a, in_b = (only_a > 0).sum(1), (only_b > 0).sum(1)
        for this, here, there in ((in_a == 0, other, one), (in_b == 0, one, other)):
            if this.any():  # all that one side needs is needed by the other: what it has beyond that must stay
                self._fix_as(here[this], there[this])
        same = (in_a == in_b) & (in_a > 0)
        if same.any():
            for column in range(in_a[same].max()):
                self._union(only_a[same, column], only_b[same, column])
            return  # the roots have changed: what is left is settled in the next round
        for single, several, rows in (
            (only_a, only_b, (in_a == 1) & (in_b > 1)),
            (only_b, only_a, (in_b == 1) & (in_a > 1)),
        ):
            if rows.any():
                self._substitute(single[rows, 0], several[rows])
                return
        odd = (in_a > 0) & (in_b > 0)
        if odd.any():
            mixed = Reason("its slices meet slices of another grouping")
            self.fix(only_a[odd], mixed)
            self.fix(only_b[odd], mixed)

    def _substitute(self, leaves: Rows, products: Rows) -> None:
        """Let leaves (rows,) stand for products (rows, factors), as far as none occurs in another's product."""
        _, first = np.unique(leaves, return_index=True)
        leaves, products = leaves[first], products[first]
        inside = np.isin(leaves, products)
        if inside.all():
            inside[0] = False
            leaves, products = leaves[:1], products[:1]
        else:
            leaves, products = leaves[~inside], products[~inside]
        used = max(1, int((products > 0).sum(1).max()))
        factors = [products[:, c] for c in range(used)]
        rest = factors.pop()
        while len(factors) > 1:
            link = self.allocate(len(leaves), "product")[:, 0]
            last = factors.pop()
            self._factors[link, 0], self._factors[link, 1] = np.where(last > 0, last, rest), rest
            rest = np.where(last > 0, link, rest)
        self._factors[leaves, 0], self._factors[leaves, 1] = factors[0], rest

    def _fix_as(self, rows: Rows, like: Rows) -> None:
        """Fix what `rows` has beyond `like`, each for the reason for which `like` is fixed."""
        extra = self.resolve(rows)
        shared = self.resolve(like)
        extra = np.where((extra[:, :, None] == shared[:, None, :]).any(2), 0, extra)
        numbers = self._why[self._leaves(like)].min(1)
        if (numbers == _FREE).any():
            spare = self._reason_number(Reason("its slices meet slices of another grouping"))
            numbers = np.where(numbers == _FREE, spare, numbers)
        for column in range(extra.shape[1]):
            ids, here = extra[:, column], extra[:, column] > 0
            np.minimum.at(self._why, ids[here], numbers[here])

    def _fixed_like(self, rows: Rows, length: int) -> Rows:
        numbers = self._why[self._leaves(rows)]
        known = numbers.size and numbers.min() < _FREE
        return self.fixed(length, self.reasons[int(numbers.min())] if known else Reason("it has no labels"))

    def _known(self, rows: Rows) -> Rows:
        """Resolved rows, where those that are always kept keep the label that says why."""
        resolved = self.resolve(rows)
        kept = ~resolved.any(1)
        if not kept.any():
            return resolved
        leaves = self._leaves(rows)
        numbers = self._why[leaves]
        first = np.take_along_axis(leaves, numbers.argmin(1)[:, None], 1)[:, 0]
        resolved = resolved.copy()
        resolved[kept, 0] = first[kept]
        return resolved

    @staticmethod
    def _in_order(which: Rows) -> Rows:
        """Numbers of equal things, counted anew in the order in which they first occur."""
        which = which.reshape(-1)
        _, first = np.unique(which, return_index=True)
        return np.argsort(np.argsort(first))[which]

    @staticmethod
    def _common(cells: Rows) -> Rows:
        """The labels that all cells (a, b, factors) of one a share: (a, factors)."""
        shared = [
            np.where((cells == cells[:, 0, c][:, None, None]).any(2).all(1), cells[:, 0, c], 0)
            for c in range(cells.shape[2])
        ]
        return _canonical(np.stack(shared, 1))

    def _leaves(self, rows: Rows) -> Rows:
        """Labels (rows, factors) with every product replaced by its factors."""
        roots = self._find(rows)
        while (product := self._factors[roots, 0] > 0).any():
            alone = np.stack([roots, np.zeros_like(roots)], -1)
            roots = np.where(product[..., None], self._factors[roots], alone).reshape(len(roots), -1)
            roots = self._find(roots[:, roots.any(0)])
        return roots

    def _find(self, ids: Rows) -> Rows:
        roots = self._parent[ids]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                self._parent[ids] = roots
                return roots
            roots = above

    def _union(self, one: Rows, other: Rows) -> None:
        """Join leaves pair by pair; pairs with a 0 are left out."""
        both = (one > 0) & (other > 0)
        one, other = one[both], other[both]
        while True:
            a, b = self._find(one), self._find(other)
            open_ = a != b
            if not open_.any():
                return
            low, high = np.minimum(a, b)[open_], np.maximum(a, b)[open_]
            np.minimum.at(self._parent, high, low)
            np.minimum.at(self._why, self._find(high), self._why[high])

    def _reason_number(self, reason: Reason) -> int:
        if not self.reasons or self.reasons[-1] != reason:
            self.reasons.append(reason)
        return len(self.reasons) - 1


def _canonical(rows: Rows) -> Rows:
    """Each row's labels in falling order, each once, without columns that hold nothing."""
    if rows.shape[1] == 1:
        return rows
    rows = -np.sort(-rows, 1)
    again = rows[:, 1:] == rows[:, :-1]
    if (again & (rows[:, 1:] > 0)).any():
        rows = rows.copy()
        rows[:, 1:][again] = 0
        rows = -np.sort(-rows, 1)
    used = max(1, int(rows.any(0).sum()))
    return rows[:, :used]


def _padded(one: Rows, other: Rows) -> tuple[Rows, Rows]:
    width = max(one.shape[1], other.shape[1])
    return (
        np.pad(one, ((0, 0), (0, width - one.shape[1]))),
        np.pad(other, ((0, 0), (0, width - other.shape[1]))),
    )
