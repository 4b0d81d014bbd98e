"""What belongs to each unit of a coupled group: its slices of tensors, its columns of weights, its part of the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from featherweight.cost.count import Profile
from featherweight.forms import Layer, is_layer
from featherweight.graph import Coupling, Group, Site
from featherweight.search.widths import Bill, Length, Term


def reader(model: nn.Module, site: Site) -> Layer | None:
    """The Linear or Conv layer whose weight reads units at this site; None where it is something else."""
    if site.role != "consumer" or site.dim != 1 or site.tensor != f"{site.layer}.weight" or not site.layer:
        return None
    layer = model.get_submodule(site.layer)
    return layer if is_layer(layer) else None


def columns(site: Site, units: int, taps: int) -> list[Tensor]:
    """Per unit its columns of the flattened weight (outputs, inputs · taps) at a consumer's site.

    Args:
        site: of a weight's input dimension.
        units: how many the group has.
        taps: elements of the kernel.
    """
    at = [torch.from_numpy(site.of(unit)) for unit in range(units)]
    return [(indices[:, None] * taps + torch.arange(taps)).flatten() for indices in at]


def slices(tensor: Tensor, site: Site, units: int) -> list[Tensor]:
    """The slices of a tensor by unit: matrices (units, elements) with a row for every unit, zeros where it has none.

    Args:
        tensor: the one the site is of.
        site: where the units lie in it.
        units: how many the group has.
    """
    rows = tensor.detach().movedim(site.dim, 0).reshape(tensor.shape[site.dim], -1)
    indices = [site.of(unit) for unit in range(units)]
    found = []
    for turn in range(max(map(len, indices), default=0)):
        matrix = rows.new_zeros(units, rows.shape[1])
        there = [unit for unit in range(units) if turn < len(indices[unit])]
        matrix[there] = rows[[int(indices[unit][turn]) for unit in there]]
        found.append(matrix)
    return found


def joint(model: nn.Module, group: Group) -> list[Tensor]:
    """What makes a group's units: slices of the model's own parameters with a row for every unit, for gradients.

    Args:
        model: with the parameters that the group was found in, whatever their values.
        group: whose producers' weights are wanted.
    """
    found = []
    for site in group.producers():
        order = site.units.argsort(kind="stable")
        rows = model.get_parameter(site.tensor).movedim(site.dim, 0)[torch.from_numpy(site.indices[order])]
        found.append(rows.reshape(group.size, -1))
    return found


def telling(coupling: Coupling, group: Group) -> list[Site]:
    """The sites whose numbers say what units are worth: weights that make or read them, or whatever holds them."""
    tensors = coupling.analysis.trace.tensors
    sites = [site for site in group.sites if tensors[site.tensor].is_floating_point()]
    return [site for site in sites if site.role != "carried"] or sites


def members(coupling: Coupling, group: Group, sites: Sequence[Site]) -> list[Tensor]:
    """All slices of a group at these sites, as `slices` gives them."""
    tensors = coupling.analysis.trace.tensors
    return [matrix for site in sites for matrix in slices(tensors[site.tensor], site, group.size)]


def _owner(tensor: str) -> str:
    """The module whose weight a tensor is; of what only confines a weight, none."""
    module, confined, of = tensor.partition(".parametrizations.")
    if confined:
        return module if of.endswith(".original") else ""
    return tensor.rpartition(".")[0]


def bills(
    coupling: Coupling, groups: Sequence[Group], counted: Profile, limits: Mapping[str, float]
) -> dict[str, Bill]:
    """What a network costs as a function of the groups' widths; what no group touches is constant.

    Multiply-accumulates of a layer go with the size of its weights; those of products of two activations, as in
    attention, are taken as constant, or as the weights' own where the module that holds both is counted as one.

    Args:
        coupling: of the network.
        groups: those whose widths may change.
        counted: the network's costs as it is.
        limits: by metric (macs, params, bytes), in absolute numbers.
    """
    lengths: dict[str, dict[int, dict[str, float]]] = {}
    for group in groups:
        for site in group.sites:
            lengths.setdefault(site.tensor, {}).setdefault(site.dim, {})[group.name] = len(site.indices) / group.size
    sizes = {group.name: group.size for group in groups}
    tensors = coupling.analysis.trace.tensors

    def length(name: str, dim: int) -> Length:
        each = lengths[name].get(dim, {})
        return Length(tensors[name].shape[dim] - sum(share * sizes[group] for group, share in each.items()), each)

    def whole(name: str, metric: str) -> float:
        tensor = tensors[name]
        if metric == "bytes":
            return float(tensor.numel() * tensor.element_size())
        if metric == "params":
            return float(tensor.numel()) if isinstance(tensor, nn.Parameter) else 0.0
        owner = _owner(name)
        if owner not in counted.layers or tensor.ndim < 2:
            return 0.0
        beside = [t.numel() for n, t in tensors.items() if _owner(n) == owner and t.ndim > 1]
        return counted.layers[owner].cost.macs * tensor.numel() / sum(beside)

    found = {}
    for metric, limit in limits.items():
        parts = {name: whole(name, metric) for name in sorted(lengths)}
        terms = [
            Term(part / tensors[name].numel(), tuple(length(name, dim) for dim in range(tensors[name].ndim)))
            for name, part in parts.items()
            if part
        ]
        found[metric] = Bill(counted.total.metric(metric) - sum(parts.values()), tuple(terms), limit)
    return found
