"""Groups: what goes together, where it lies, what it is called, and what cannot go."""

from __future__ import annotations

import pytest
import torch
from constructs import CONSTRUCTS, IMAGE, Net, conv, example, head
from torch import nn

from featherweight.graph import GraphError, couple


def coupled(name: str):
    build, shape, _ = CONSTRUCTS[name]
    return couple(build(), example(shape))


def test_a_group_knows_its_producer_its_norm_and_its_consumer():
    coupling = couple(
        Net(lambda s, x: head(s, s.b(s.a(x))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 3)), example(IMAGE)
    )
    group = coupling.group("a.0 channels")
    assert (group.kind, group.size, group.granularity) == ("channels", 8, 1)
    assert {(site.tensor, site.dim, site.role, site.layer) for site in group.sites} == {
        ("a.0.weight", 0, "producer", "a.0"),
        ("a.0.bias", 0, "carried", "a.0"),
        ("a.1.weight", 0, "carried", "a.1"),
        ("a.1.bias", 0, "carried", "a.1"),
        ("a.1.running_mean", 0, "carried", "a.1"),
        ("a.1.running_var", 0, "carried", "a.1"),
        ("b.0.weight", 1, "consumer", "b.0"),
    }
    assert [site.of(5).tolist() for site in group.sites] == [[5]] * 7
    assert str(coupling.frozen["fc.weight", 0]) == "it is the network's output"
    assert str(coupling.frozen["a.0.weight", 1]) == "it meets the network's input"
    assert ("a.0.weight", 2) not in coupling.frozen


def test_columns_of_a_flattened_channel_are_where_they_belong():
    for name, expected in (("flatten", list(range(128, 192))), ("flatten channels last", list(range(2, 512, 8)))):
        group = coupled(name).group("a.0 channels")
        (columns,) = (site for site in group.consumers() if site.tensor == "h.weight")
        assert columns.of(2).tolist() == expected


def test_a_residual_couples_both_producers():
    group = coupled("a residual").group("a.0 channels")
    assert {site.layer for site in group.producers()} == {"a.0", "b.0"}
    assert {site.layer for site in group.consumers()} == {"b.0", "fc"}


def test_parts_of_one_layer_that_go_different_ways_are_different_groups():
    coupling = coupled("parts by slices")
    assert {group.name: group.size for group in coupling.groups} == {
        "a.0 channels": 5, "a.0 channels #2": 7, "b.0 channels": 8}  # fmt: skip
    second = next(site for site in coupling.group("a.0 channels #2").sites if site.tensor == "a.0.weight")
    assert second.indices.tolist() == list(range(5, 12))


def test_heads_and_their_dims_are_separate_groups():
    coupling = coupled("fused attention")
    kinds = {group.kind: (group.size, group.granularity) for group in coupling.groups}
    assert kinds == {"neurons": (24, 1), "heads": (4, 18), "head dims": (6, 12)}
    heads = next(group for group in coupling.groups if group.kind == "heads")
    rows = next(site for site in heads.sites if site.tensor == "qkv.weight")
    assert rows.of(1).tolist() == [*range(6, 12), *range(30, 36), *range(54, 60)]


def test_key_heads_take_their_query_heads_along_and_rotary_halves_stay_pairs():
    coupling = coupled("shared keys and rotary halves")
    by_kind = {group.kind: group for group in coupling.groups}
    keys = next(site for g in coupling.groups for site in g.sites if site.tensor == "k.weight" and g.kind == "heads")
    assert len(keys.of(0)) == 6
    queries = next(site for site in by_kind["heads"].sites if site.tensor == "q.weight")
    assert len(queries.of(0)) in (6, 12)
    pairs = next(g for g in coupling.groups if any(site.tensor == "cos" for site in g.sites))
    (cos,) = (site for site in pairs.sites if site.tensor == "cos")
    assert [cos.of(unit).tolist() for unit in range(3)] == [[0, 3], [1, 4], [2, 5]]


def test_a_grouped_convolution_keeps_the_same_channels_in_every_group():
    group = coupled("grouped").group("d.0 channels")
    assert (group.size, group.granularity) == (6, 2)
    (rows,) = group.producers()
    assert rows.of(1).tolist() == [1, 7]


def test_names_and_order_are_the_same_every_time():
    for name in CONSTRUCTS:
        assert [g.name for g in coupled(name).groups] == [g.name for g in coupled(name).groups], name


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"a.0 chanels": [0]}, "no group 'a.0 chanels'; did you mean 'a.0 channels'"),
        ({"a.0 channels": []}, "'a.0 channels' would be empty: keep at least one of its 8 units"),
        ({"a.0 channels": [8]}, "has the units 0 to 7, not 8 to 8"),
        ({"a.0 channels": [-1, 2]}, "has the units 0 to 7, not -1 to 2"),
    ],
)
def test_what_cannot_be_kept_is_refused(kept, message):
    with pytest.raises(GraphError, match=message):
        coupled("flatten").kept(kept)


def test_kept_says_which_indices_of_every_tensor_stay():
    kept = coupled("flatten").kept({"a.0 channels": [1, 2]})
    assert kept["a.0.weight"][0].tolist() == [i in (1, 2) for i in range(8)]
    assert kept["h.weight"][1].sum() == 128
    assert kept["fc.weight"][0].all()


def test_a_model_needs_an_example():
    with pytest.raises(GraphError, match="give an example"):
        couple(nn.Linear(2, 2))


def test_many_layers_are_analysed_in_steps_that_do_not_grow():
    """Counted, not timed: labels looked at per layer are the same in a net ten times as deep."""
    counts = []
    for depth in (3, 30):
        model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.ReLU())))
        analysis = couple(model, example((2, 16))).analysis
        counts.append(len(analysis.labels) / depth)
    assert counts[1] <= counts[0]


def test_layers_that_nothing_uses_are_left_out():
    model = Net(lambda s, x: head(s, s.a(x)), a=conv(3, 8), unused=nn.Linear(4, 4), fc=nn.Linear(8, 3))
    coupling = couple(model, example(IMAGE))
    assert {site.layer for group in coupling.groups for site in group.sites} == {"a.0", "a.1", "fc"}
    assert not any(name.startswith("unused") for name, _ in coupling.frozen)
    assert torch.is_tensor(model.unused.weight)
