"""Groups: what goes together, where it lies, what it is called, and what cannot go."""

from __future__ import annotations

import pytest
import torch
from constructs import CONSTRUCTS, IMAGE, TOKENS, Net, conv, example, head, masked, randomised, some
from torch import nn

from featherweight.graph import GraphError, couple, narrow


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


def test_an_example_is_given_as_to_a_task():
    model, x = CONSTRUCTS["a residual"][0](), example(CONSTRUCTS["a residual"][1]).args[0]
    for given in (x, (x,), [x], {"x": x}):
        assert {group.name for group in couple(model, given).groups} == {g.name for g in coupled("a residual").groups}


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


def masked_attention(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Positions, rotation and mask are tables for longer inputs than the example."""
    t = x.shape[1]
    x = self.embed(x) + self.position[:, :t] + self.by_layer(self.grid)[:t]
    q, k = self.q(x) * self.cos[:t], self.k(x) * self.cos[:t]
    scores = (q @ k.transpose(1, 2)).masked_fill(self.tril[:t, :t] == 0, float("-inf"))
    return self.head((scores.softmax(-1) @ self.v(x))[:, 0])


def test_rows_of_tables_that_the_example_does_not_reach_stay():
    parts = {
        name: nn.Linear(*sizes)
        for name, sizes in {
            "embed": (10, 8), "by_layer": (4, 8), "q": (8, 6), "k": (8, 6), "v": (8, 6), "head": (6, 3)
        }.items()
    }  # fmt: skip
    tables = {"grid": nn.Buffer(torch.randn(32, 4)), "cos": nn.Buffer(torch.randn(32, 6))}
    tril, position = nn.Buffer(torch.ones(32, 32).tril()), nn.Parameter(torch.randn(1, 32, 8))
    model = randomised(Net(masked_attention, **parts, **tables, tril=tril, position=position))
    inputs = example(TOKENS)
    coupling = couple(model, inputs)
    made = {site.tensor for group in coupling.groups for site in group.producers()}
    assert made == {f"{name}.weight" for name in ("embed", "by_layer", "q", "k", "v")}
    narrowed = narrow(model, coupling, some(coupling)).module
    shapes = {name: tuple(getattr(narrowed, name).shape) for name in ("position", "grid", "cos", "tril")}
    assert shapes == {"position": (1, 32, 4), "grid": (32, 2), "cos": (32, 3), "tril": (32, 32)}
    longer = example((2, 16, 10), seed=1)  # 10 positions more than the example has
    reference = masked(model, narrow(model, coupling, some(coupling)).narrowing)
    assert torch.allclose(narrowed(*longer.args), reference(*longer.args), rtol=1e-9, atol=1e-10)


def test_channels_that_a_slice_leaves_to_nobody_stay_with_the_reason():
    model = Net(lambda s, x: head(s, s.a(x)[:, :8]), a=conv(3, 12), fc=nn.Linear(8, 3))
    coupling = couple(model, example(IMAGE))
    assert coupling.group("a.0 channels").size == 8
    model = Net(lambda s, x: s.fc(s.table[2:8].sum() + x.mean((2, 3))), table=nn.Buffer(torch.randn(12)),
        fc=nn.Linear(3, 3))  # fmt: skip
    coupling = couple(model, example(IMAGE))
    assert coupling.group("table features").size == 6


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.einsum("bto,oc->btc", torch.einsum("bti,io->bto", x, s.one).relu(), s.two).mean(1),
        lambda s, x: torch.bmm(torch.bmm(x, s.one.expand(2, -1, -1)).relu(), s.two.expand(2, -1, -1)).mean(1),
        lambda s, x: (x @ s.one).relu().matmul(s.two).mean(1),
    ],
    ids=["einsum", "bmm", "matmul"],
)
def test_bare_weights_of_products_make_and_read_units(forward):
    model = Net(forward, one=nn.Parameter(torch.randn(10, 8)), two=nn.Parameter(torch.randn(8, 3)))
    (group,) = couple(model, example(TOKENS)).groups
    assert {(site.tensor, site.dim) for site in group.sites} == {("one", 1), ("two", 0)}
