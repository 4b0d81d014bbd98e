"""What belongs to each unit of a group, against the narrowed network itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Residual, make
from torch import Tensor, nn

from featherweight.batch import as_inputs
from featherweight.cost.count import profile
from featherweight.graph import Coupling, Group, Site, couple, narrow
from featherweight.prune import Channels
from featherweight.prune.units import bills, columns, members, reader, slices, telling

METRICS = ("macs", "params", "bytes")


class Branches(nn.Module):
    """A concatenation into two Linear layers, the first of which sees four places of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.first = nn.Linear(40, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.cat([self.left(x), self.right(x)], 1)).flatten(1)
        return self.last(torch.relu(self.first(x)))


def coupled(model: nn.Module, data: Tensor) -> Coupling:
    return couple(model.eval(), as_inputs(data))


def site(group: Group, layer: str, role: str) -> Site:
    return next(site for site in group.sites if site.layer == layer and site.role == role)


@pytest.fixture
def branches() -> tuple[Branches, Coupling]:
    torch.manual_seed(0)
    model = Branches()
    return model, coupled(model, torch.randn(2, 3, 8, 8))


def test_columns_of_a_linear_layer_behind_pooled_channels(branches):
    _, coupling = branches
    group = coupling.group("right channels")
    at = columns(site(group, "first", "consumer"), group.size, 1)
    assert [unit.tolist() for unit in at] == [list(range(16 + 4 * unit, 20 + 4 * unit)) for unit in range(6)]


def test_columns_of_a_convolution_are_whole_kernels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, (3, 2)))
    (group,) = coupled(model, torch.randn(2, 3, 9, 9)).groups
    at = columns(site(group, "2", "consumer"), 4, 6)
    assert [unit.tolist() for unit in at] == [list(range(6 * unit, 6 * unit + 6)) for unit in range(4)]
    zeroed = model[2].weight.detach().reshape(2, -1).clone()
    zeroed[:, at[1]] = 0
    assert zeroed.reshape(model[2].weight.shape)[:, 1].eq(0).all()
    assert zeroed.reshape(model[2].weight.shape)[:, [0, 2, 3]].ne(0).all()


def test_slices_are_those_that_go_with_the_unit(branches):
    model, coupling = branches
    group = coupling.group("left channels")
    (made,) = slices(model.left.weight, site(group, "left", "producer"), group.size)
    assert torch.equal(made, model.left.weight.detach().flatten(1))
    read = slices(model.first.weight, site(group, "first", "consumer"), group.size)
    assert len(read) == 4
    for turn, matrix in enumerate(read):
        assert torch.equal(matrix, model.first.weight.detach()[:, [4 * unit + turn for unit in range(4)]].T)


def test_units_without_as_many_slices_have_zeros_in_their_place():
    tensor = torch.arange(1.0, 7.0).reshape(1, 6)
    places = torch.tensor([0, 2, 3, 5]).numpy(), torch.tensor([1, 0, 1, 2]).numpy()
    found = slices(tensor, Site("weight", 1, *places, "consumer"), 4)
    assert torch.stack(found)[..., 0].tolist() == [[3, 1, 6, 0], [0, 4, 0, 0]]


def test_members_have_the_energy_of_all_slices(branches):
    model, coupling = branches
    group = coupling.group("left channels")
    found = members(coupling, group, telling(coupling, group))
    energy = torch.stack([matrix.square().sum(1) for matrix in found]).sum(0)
    reads = model.first.weight.detach()[:, :16].reshape(7, 4, 4).square().sum((0, 2))
    assert torch.allclose(energy, model.left.weight.detach().square().sum((1, 2, 3)) + reads)
    (biases,) = members(coupling, group, [site for site in group.sites if site.role == "carried"])
    assert torch.equal(biases[:, 0], model.left.bias.detach())


@pytest.mark.parametrize(
    ("layer", "reads"),
    [
        (nn.Conv2d(4, 2, 3), True),
        (nn.ConvTranspose2d(4, 2, 3), False),
        (nn.utils.parametrize.register_parametrization(nn.Conv2d(4, 2, 3), "weight", nn.Tanh()), False),
        (nn.Conv2d(4, 4, 3, groups=4), False),
    ],
    ids=["plain", "transposed", "parametrized", "depthwise"],
)
def test_a_reader_is_a_linear_or_conv_layer_that_reads_with_its_weight(layer, reads):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), layer, nn.Conv2d(layer.out_channels, 3, 1))
    coupling = coupled(model, torch.randn(2, 3, 9, 9))
    group = next(group for group in coupling.groups if group.name == "0 channels")
    found = [reader(model, site) for site in group.sites if site.layer == "2"]
    assert [made for made in found if made is not None] == ([layer] if reads else [])


def test_a_linear_layer_reads_and_its_producer_does_not(branches):
    model, coupling = branches
    group = coupling.group("left channels")
    assert reader(model, site(group, "first", "consumer")) is model.first
    assert reader(model, site(group, "left", "producer")) is None


# Bills


@st.composite
def conv_nets(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Three convolutions with or without norms, groups and biases, a pooled classifier behind them."""
    widths = draw(st.lists(st.sampled_from([4, 6, 8]), min_size=3, max_size=3))
    layers: list[nn.Module] = []
    inputs = 3
    for n, outputs in enumerate(widths):
        groups = draw(st.sampled_from([1, 2])) if n and inputs % 2 == 0 else 1
        layers.append(nn.Conv2d(inputs, outputs, draw(st.sampled_from([1, 3])), padding=1, groups=groups))
        layers += [nn.BatchNorm2d(outputs)] if draw(st.booleans()) else []
        layers += [nn.ReLU()]
        inputs = outputs
    side = draw(st.sampled_from([1, 2]))
    layers += [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(inputs * side**2, 5)]
    return nn.Sequential(*layers), torch.randn(2, 3, 6, 6)


def true_costs(model: nn.Module, coupling: Coupling, widths: dict[str, int], data: Tensor) -> dict[str, float]:
    narrowed = narrow(model, coupling, {name: range(width) for name, width in widths.items()}, check=False).module
    return {metric: profile(narrowed, as_inputs(data)).total.metric(metric) for metric in METRICS}


@settings(max_examples=20, deadline=None)
@given(conv_nets(), st.data())
def test_a_bill_is_what_the_narrowed_network_costs(net: tuple[nn.Module, Tensor], data: st.DataObject):
    model, example = net
    coupling = coupled(model, example)
    made = bills(coupling, coupling.groups, profile(model, as_inputs(example)), dict.fromkeys(METRICS, 1.0))
    widths = {group.name: data.draw(st.integers(1, group.size), label=group.name) for group in coupling.groups}
    true = true_costs(model, coupling, widths, example)
    assert {metric: bill.at(widths) for metric, bill in made.items()} == pytest.approx(true)


@pytest.mark.parametrize("network", NETWORKS)
def test_bills_of_networks_with_shortcuts_and_attention(network):
    """Products of two activations, as in attention, count as constant: there a bill is not below the true cost."""
    model, data = make(NETWORKS[network]), NETWORKS[network].data(2)
    coupling = coupled(model, data)
    counted = profile(model, as_inputs(data))
    groups = [group for group in coupling.groups if group.kind in Channels.kinds]
    made = bills(coupling, groups, counted, dict.fromkeys(METRICS, 1.0))
    whole = {group.name: group.size for group in groups}
    half = {group.name: (group.size + 1) // 2 for group in groups}
    for metric, bill in made.items():
        assert bill.at(whole) == pytest.approx(counted.total.metric(metric))
    true = true_costs(model, coupling, half, data)
    attention = network in ("transformer", "attention")
    for metric in ("params", "bytes") if attention else METRICS:
        assert made[metric].at(half) == pytest.approx(true[metric]), metric
    assert true["macs"] <= made["macs"].at(half) <= (1.3 if attention else 1) * true["macs"]


def test_groups_that_are_left_alone_are_constant():
    model, data = make(Residual), Residual.data(2)
    coupling = coupled(model, data)
    counted = profile(model, as_inputs(data))
    one = coupling.group("one channels")
    bill = bills(coupling, [one], counted, {"params": 10.0})["params"]
    assert bill.limit == 10
    widths = {"one channels": 5}
    assert bill.at(widths) == true_costs(model, coupling, widths, data)["params"]
    stem = 3 * 16 * 9 + 2 * 16
    assert bill.constant >= stem
