"""Which slices of which tensors must go together: groups of units, and why the rest cannot go.

A unit is the smallest thing that can be removed: a channel with the filter that makes it, the norm that carries it
and the columns of every layer that reads it; or a head; or one channel in each group of a grouped convolution. Units
that play the same part at the same places form a group, and any number of them, but not all, may go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from featherweight.errors import did_you_mean
from featherweight.graph.analysis import Analysis, analyse
from featherweight.graph.labels import Reason
from featherweight.graph.trace import GraphError, Trace, capture

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Site:
    """Where the units of a group lie in one dimension of one tensor.

    Attributes:
        tensor: the parameter's or buffer's name, the first that the model registers it under.
        dim: the dimension.
        indices: the indices along it that belong to units of the group, rising.
        units: the unit of each of them.
        role: "producer" where the slices make the units (output dimension of a weight), "consumer" where they read them
            (input dimension of a weight), "carried" elsewhere: norms, biases, positions, buffers.
    """

    tensor: str
    dim: int
    indices: Indices
    units: Indices
    role: str

    @property
    def layer(self) -> str:
        """The name of the module that holds the tensor; of a parametrized weight, the module it is the weight of."""
        return (
            self.tensor.partition(".parametrizations.")[0]
            if ".parametrizations." in self.tensor
            else _owner(self.tensor)
        )

    def of(self, unit: int) -> Indices:
        """The indices that go when this unit goes."""
        made: Indices = self.indices[self.units == unit]
        return made


@dataclass(frozen=True, eq=False)
class Group:
    """Units that play the same part, each of which can go.

    Attributes:
        name: readable and stable: the layer that makes the units, and their kind.
        kind: "channels" (convolutions), "neurons" (linear and recurrent layers), "features" (only embeddings or bare
            parameters make them), "heads", or "head dims": one place in the width of every head. Of a dimension that
            is seen otherwise as so many parts of a length, "blocks" are the parts, and "slots" one place in every part.
        size: how many units there are.
        granularity: how many indices of the dimension that makes them go with one unit: 1 for plain channels, the
            head's
            width for heads, the number of heads for head dims, the number of groups in a grouped convolution.
        sites: every place they lie in.
    """

    name: str
    kind: str
    size: int
    granularity: int
    sites: tuple[Site, ...]
    labels: Indices = field(repr=False, default_factory=lambda: np.zeros(0, np.int64))

    def producers(self) -> tuple[Site, ...]:
        """The output dimensions of weights that make the units."""
        return tuple(site for site in self.sites if site.role == "producer")

    def consumers(self) -> tuple[Site, ...]:
        """The input dimensions of weights that read them."""
        return tuple(site for site in self.sites if site.role == "consumer")


@dataclass(frozen=True, eq=False)
class Coupling:
    """What of a network can be narrowed, and what cannot.

    Attributes:
        groups: in the order of their first tensor in the graph.
        frozen: by tensor name and dimension, why no slice along it can go. Extents of kernels are not listed.
        unknown: operations that no rule covers, and where they are.
        analysis: the graph with its labels, for narrowing it.
    """

    groups: tuple[Group, ...]
    frozen: Mapping[tuple[str, int], Reason]
    unknown: tuple[tuple[str, Reason], ...]
    analysis: Analysis = field(repr=False)

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            GraphError: there is none.
        """
        found = next((group for group in self.groups if group.name == name), None)
        if found is None:
            raise GraphError(f"there is no group {name!r}{did_you_mean(name, [g.name for g in self.groups])}")
        return found

    def kept(self, kept: Mapping[str, Sequence[int]]) -> dict[str, list[npt.NDArray[np.bool_]]]:
        """For every tensor of the graph and each of its dimensions which indices stay, given the units that stay.

        Args:
            kept: by group name, the units that stay; groups that are not named keep all.

        Raises:
            GraphError: a group that is not there, a unit that is not in it, or none left.
        """
        lost = self.lost(kept)
        return {name: [self.stays(axis.rows, lost) for axis in axes] for name, axes in self.analysis.tensors.items()}

    def lost(self, kept: Mapping[str, Sequence[int]]) -> npt.NDArray[np.bool_]:
        """By label, whether it goes."""
        lost = np.zeros(len(self.analysis.labels), bool)
        for name, units in kept.items():
            group = self.group(name)
            wanted = np.unique(np.asarray(list(units), np.int64))
            if not len(wanted):
                raise GraphError(f"group {name!r} would be empty: keep at least one of its {group.size} units")
            if wanted[0] < 0 or wanted[-1] >= group.size:
                raise GraphError(f"group {name!r} has the units 0 to {group.size - 1}, not {wanted[0]} to {wanted[-1]}")
            gone = np.ones(group.size, bool)
            gone[wanted] = False
            lost[group.labels[gone]] = True
        return lost

    def stays(self, rows: Indices, lost: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which of a dimension's indices stay."""
        gone: npt.NDArray[np.bool_] = lost[self.analysis.labels.resolve(rows)]
        return np.asarray(~gone.any(1), np.bool_)


def couple(model: nn.Module | Trace, inputs: Any = None) -> Coupling:
    """Find out what of a model can be narrowed.

    Args:
        model: the model, on any device, meta included; or its trace.
        inputs: an example of its inputs, as `Task.example` or as `Inputs`; not needed for a trace.

    Raises:
        GraphError: the model cannot be captured, or inputs are missing.
    """
    if not isinstance(model, Trace):
        if inputs is None:
            raise GraphError("to couple a model, give an example of its inputs too")
        model = capture(model, inputs)
    analysis = analyse(model)
    return Coupling(_groups(analysis), _frozen(analysis), tuple(analysis.unknown), analysis)


def _groups(analysis: Analysis) -> tuple[Group, ...]:
    labels = analysis.labels
    leaves, families = labels.leaves()
    order = np.lexsort((families, leaves))
    leaves, families = leaves[order], families[order]
    starts = np.flatnonzero(np.diff(leaves, prepend=0))  # labels count from 1
    part_of: dict[bytes, int] = {}
    group_of = np.full(len(labels), -1, np.int64)
    kinds = _kinds(analysis)
    kind_of: list[str] = []
    for start, end in zip(starts, [*starts[1:], len(leaves)][: len(starts)], strict=True):
        played = families[start:end]
        number = part_of.setdefault(played.tobytes(), len(part_of))
        if number == len(kind_of):
            kind_of.append(next((kinds[f] for f in played if f in kinds), ""))
        group_of[leaves[start]] = number
    # only labels that reach a parameter, buffer or constant are units
    resolved = {name: [labels.resolve(axis.rows) for axis in axes] for name, axes in analysis.tensors.items()}
    members: dict[int, set[int]] = {}
    for dims in resolved.values():
        for rows in dims:
            for label in np.unique(rows[rows > 0]):
                members.setdefault(int(group_of[label]), set()).add(int(label))
    unit_of = np.full(len(labels), -1, np.int64)
    chosen = {number: np.array(sorted(found), np.int64) for number, found in members.items()}
    for found in chosen.values():
        unit_of[found] = np.arange(len(found))
    sites: dict[int, list[Site]] = {number: [] for number in chosen}
    kinds_made: dict[int, list[str]] = {number: [] for number in chosen}
    for name, dims in resolved.items():
        for d, rows in enumerate(dims):
            role, kind = analysis.roles.get(id(analysis.tensors[name][d].rows), ("carried", ""))
            for column in range(rows.shape[1]):
                here = group_of[rows[:, column]]
                here[rows[:, column] == 0] = -1
                for number in np.unique(here[here >= 0]):
                    indices = np.flatnonzero(here == number)
                    site = Site(name, d, indices, unit_of[rows[indices, column]], role)
                    sites[int(number)].append(site)
                    if role == "producer":
                        kinds_made[int(number)].append(kind)
    groups: list[Group] = []
    names: set[str] = set()
    for number in sorted(chosen, key=lambda n: chosen[n][0]):
        places = _joined(sites[number])
        kind = kind_of[number] or _kind(kinds_made[number])
        main = next((site for site in places if site.role == "producer"), places[0])
        name = f"{main.layer or main.tensor} {kind}"
        count = 2
        while name in names:
            name, count = f"{main.layer or main.tensor} {kind} #{count}", count + 1
        names.add(name)
        size_ = len(chosen[number])
        granularity = max(1, round(len(main.indices) / size_))
        if size_ > 1:
            groups.append(Group(name, kind, size_, granularity, tuple(places), chosen[number]))
    return tuple(groups)


def _joined(sites: Sequence[Site]) -> list[Site]:
    """Sites, those of one dimension that several columns of labels gave put together."""
    met: dict[tuple[str, int], Site] = {}
    for site in sites:
        other = met.get((site.tensor, site.dim))
        if other is not None:
            indices, units = np.r_[other.indices, site.indices], np.r_[other.units, site.units]
            order = np.argsort(indices, kind="stable")
            site = Site(site.tensor, site.dim, indices[order], units[order], site.role)
        met[site.tensor, site.dim] = site
    return list(met.values())


def _kinds(analysis: Analysis) -> dict[int, str]:
    """By family of labels, the kind that attention gives it."""
    labels, found = analysis.labels, {}
    leaves, families = labels.leaves()
    by_leaf: dict[int, list[int]] = {}
    wanted: set[int] = set()
    marked: list[tuple[str, set[int]]] = []
    for value in analysis.values.values():
        for axis in value if isinstance(value, tuple) else ():
            role = analysis.roles.get(id(axis.rows), ("", ""))[0]
            if role in ("heads", "head dims"):
                rows = set(np.unique(labels.resolve(axis.rows))[:].tolist()) - {0}
                marked.append((role, rows))
                wanted |= rows
    here = np.isin(leaves, np.array(sorted(wanted), np.int64))
    for leaf, family in zip(leaves[here].tolist(), families[here].tolist(), strict=True):
        by_leaf.setdefault(leaf, []).append(family)
    for role, rows in marked:
        for leaf in rows:
            for family in by_leaf.get(leaf, ()):
                if labels.families[family].endswith(("/outer", "/inner")):
                    found[family] = role
                    if role == "heads" and labels.families[family].endswith("/outer"):
                        found.setdefault(family + 1, "head dims")
    for family, name in enumerate(labels.families):
        if name.endswith("/outer"):
            found.setdefault(family, "blocks")
        elif name.endswith("/inner"):
            found.setdefault(family, "slots")
    return found


def _kind(made: Sequence[str]) -> str:
    return next((kind for kind in ("channels", "neurons") if kind in made), "features")


def _frozen(analysis: Analysis) -> dict[tuple[str, int], Reason]:
    labels, found = analysis.labels, {}
    for name, axes in analysis.tensors.items():
        for d, axis in enumerate(axes):
            if len(axis) > 1 and not labels.resolve(axis.rows).any():
                reasons = labels.why(axis.rows)
                if reasons and reasons[0].text != "the extent of a kernel":
                    found[name, d] = reasons[0]
    return found


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]
