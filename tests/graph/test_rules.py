"""Every rule alone: a network with one hazard, narrowed by half, answers as the eager original with zeros."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from constructs import CONSTRUCTS, IMAGE, TOKENS, Net, assert_equals_masked, conv, example, half, head, randomised, some
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from featherweight.graph import Narrowing, couple, narrow, norms_over_kept


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_construct_narrowed_answers_as_masked(name):
    build, shape, layers = CONSTRUCTS[name]
    model, coupling, narrowed = half(build(), shape)
    assert coupling.unknown == ()
    assert {site.layer for group in coupling.groups for site in group.producers()} | {""} == layers | {""}
    assert_equals_masked(model, example(shape), narrowed)
    fewer = sum(p.numel() for p in narrowed.module.parameters()) / sum(p.numel() for p in model.parameters())
    assert fewer < 0.75


@pytest.mark.parametrize(
    "name", ["channel shuffle", "fused attention", "parts by slices", "a constant index", "recurrent"]
)
def test_both_forms_are_the_same_network(name):
    build, shape, _ = CONSTRUCTS[name]
    model, coupling, narrowed = half(build(), shape)
    graph = narrow(model, coupling, narrowed.narrowing.kept, form="graph")
    x = example(shape, seed=3).args[0]
    assert torch.allclose(graph.module(x), narrowed.module(x), rtol=1e-9, atol=1e-12)


def overwritten(y):
    part = y[:, :4]
    y.sigmoid_()
    return part.sum(1)


FREEZING = {
    "softmax": (lambda s, x: head(s, s.a(x).softmax(1)), "softmax runs along it"),
    "argmax": (lambda s, x: s.fc((y := s.a(x)).mean((2, 3)) + y.argmax(1).double().mean()), "argmax runs along it"),
    "response norm": (lambda s, x: head(s, F.local_response_norm(s.a(x), 3)), ""),
    "sort": (lambda s, x: head(s, s.a(x).sort(1)[0]), "sort runs along it"),
    "a slice with a step": (lambda s, x: head(s, s.a(x)[:, ::2].repeat_interleave(2, 1)),
        "every so many are taken of it"),
    "a computed index": (
        lambda s, x: head(s, s.a(x).gather(1, torch.zeros_like(s.a(x)).long())), "an index reads it"),
    "an operation without a rule": (lambda s, x: head(s, s.a(x).renorm(2, 1, 1.0)),
        "no rule covers aten.renorm.default"),
    "a gate summed over channels": (
        lambda s, x: s.b(s.a(x).sigmoid().sum(1, keepdim=True)),
        "a sum over slices that are not zero where their weights are"),
    "division by what may be zero": (
        lambda s, x: head(s, (y := s.a(x)) / y.mean((2, 3), keepdim=True)), "division by a slice that is zero"),
    "a standardised weight": (
        lambda s, x: F.conv2d(s.a(x), F.batch_norm(s.w.flatten(1)[None], None, None, training=True).view(8, 8, 1, 1)),
        "a mean and a variance are taken along it"),
    "one channel stretched, and a sum": (
        lambda s, x: s.wide((s.one(x).expand(-1, 8, -1, -1) + s.a(x)).sum(1).flatten(1)),
        "a sum over slices that are not zero where their weights are"),
    "one channel stretched like another tensor, and a sum": (
        lambda s, x: s.wide((s.one(x).expand_as(y := s.a(x)) + y).sum(1).flatten(1)),
        "a sum over slices that are not zero where their weights are"),
    "one channel repeated, and a sum": (
        lambda s, x: s.wide((s.one(x).repeat(1, 8, 1, 1) + s.a(x)).sum(1).flatten(1)),
        "a sum over slices that are not zero where their weights are"),
    "a view of what is then overwritten": (
        lambda s, x: s.wide(overwritten(s.a(x)).flatten(1)), "it is overwritten in place, in part or through a view"),
    "coordinates of a grid": (
        lambda s, x: F.grid_sample(x, s.a(x)[:, :2].permute(0, 2, 3, 1), align_corners=False),
        "coordinates of positions"),
    "groups by the batch": (
        lambda s, x: s.fc(F.conv2d((y := s.a(x)).flatten(0, 1)[None], s.w.repeat(x.shape[0], 1, 1, 1),
            groups=x.shape[0]).view(y.shape).mean((2, 3))), "number of groups depends on the batch"),
    "the output": (lambda s, x: s.a(x), "it is the network's output"),
}  # fmt: skip


@pytest.mark.parametrize("name", FREEZING)
def test_what_cannot_go_is_listed_with_its_reason(name):
    forward, reason = FREEZING[name]
    model = randomised(
        Net(
            forward,
            a=nn.Conv2d(3, 8, 3),
            b=nn.Conv2d(1, 1, 1),
            one=nn.Conv2d(3, 1, 3),
            fc=nn.Linear(8, 3),
            wide=nn.Linear(36, 3),
            w=nn.Parameter(torch.randn(8, 8, 1, 1)),
        )
    )
    coupling = couple(model, example(IMAGE))
    assert not coupling.groups
    assert reason in str(coupling.frozen["a.weight", 0])


def test_a_reason_names_the_line_and_the_module():
    class Sorted(nn.Module):
        def forward(self, x):
            return x.sort(1)[0]

    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), Sorted(), nn.Conv2d(8, 2, 1)))
    assert str(couple(model, example(IMAGE)).frozen["0.weight", 0]).endswith("in 1)")
    assert "test_rules.py:" in str(couple(model, example(IMAGE)).frozen["0.weight", 0])


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=["layer norm", "rms norm"])
def test_norms_take_statistics_over_what_is_kept(norm):
    model = randomised(nn.Sequential(nn.Linear(10, 8), norm, nn.Linear(8, 3)))
    coupling = couple(model, example(TOKENS))
    narrowed = narrow(model, coupling, {"0 neurons": [0, 3, 4]})
    x = example(TOKENS).args[0]
    middle = model[0](x)[..., [0, 3, 4]]
    settings = {"weight": norm.weight[[0, 3, 4]], "eps": norm.eps}
    if isinstance(norm, nn.LayerNorm):
        middle = F.layer_norm(middle, (3,), bias=norm.bias[[0, 3, 4]], **settings)
    else:
        middle = F.rms_norm(middle, (3,), **settings)
    expected = middle @ model[2].weight[:, [0, 3, 4]].T + model[2].bias
    assert torch.allclose(narrowed.module(x), expected, rtol=1e-9)
    assert narrowed.narrowing.form == "module"


def layer_norm_2d(s, x):
    x = s.a(x)
    u = x.mean(1, True)
    v = (x - u).pow(2).mean(1, True)
    return (x - u) / torch.sqrt(v + 1e-6) * s.scale + s.shift


def inline_layer_norm(s, x):
    x = s.a(x)
    return (x - x.mean(1, True)) / ((x - x.mean(1, True)) ** 2).mean(1, True).add(1e-6).sqrt() * s.scale + s.shift


def rms_norm_in_float(s, x):
    x = s.a(x)
    return (x * (1 / torch.sqrt(x.float().square().mean(1, True) + 1e-6))).type_as(x) * s.scale


WRITTEN_OUT = {  # name -> forward, whether it centres
    "layer norm": (layer_norm_2d, True),
    "layer norm in one line": (inline_layer_norm, True),
    "rms norm": (lambda s, x: (y := s.a(x)) * torch.rsqrt((y * y).mean(1, True) + 1e-6) * s.scale, False),
    "rms norm with casts": (rms_norm_in_float, False),
}


def channels_of(forward):
    return randomised(
        Net(
            forward,
            a=nn.Conv2d(3, 8, 3),
            other=nn.Conv2d(3, 8, 3),
            c=nn.Conv2d(8, 3, 1),
            fc=nn.Linear(36, 3),
            scale=nn.Parameter(torch.randn(8, 1, 1)),
            shift=nn.Parameter(torch.randn(8, 1, 1)),
        )
    )


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_norms_written_out_take_all_their_statistics_over_what_is_kept(name):
    forward, centres = WRITTEN_OUT[name]
    model = channels_of(lambda s, x: s.c(forward(s, x)))
    keep = [0, 3, 4]
    coupling = couple(model, example(IMAGE))
    narrowed = narrow(model, coupling, {"a channels": keep})
    x = example(IMAGE).args[0]
    y = model.a(x)[:, keep].movedim(1, -1)
    made = F.layer_norm(y, (3,), eps=1e-6) if centres else F.rms_norm(y, (3,), eps=1e-6)
    made = made.movedim(-1, 1) * model.scale[keep] + (model.shift[keep] if centres else 0)
    expected = F.conv2d(made, model.c.weight[:, keep], model.c.bias)
    assert torch.allclose(narrowed.module(x), expected, rtol=1e-6)
    assert narrowed.narrowing.form == "module"
    assert all(".py:" in place for place in norms_over_kept(coupling, {"a channels": keep}))
    assert norms_over_kept(coupling, {"a channels": keep})
    assert not norms_over_kept(coupling, {})


def centre_used_again(s, x):
    y = s.a(x)
    u = y.mean(1, True)
    return s.c((y - u) / ((y - u) ** 2).mean(1, True).add(1).sqrt() * s.scale + s.shift + u)


NO_NORMS = {  # name -> forward, whether the means can be taken without some of a's channels
    "the root of a mean of a product": (
        lambda s, x: s.fc((s.a(x).sigmoid() * s.other(x).sigmoid()).mean(1).sqrt().flatten(1)), False),
    "pooling by the root of squares": (
        lambda s, x: s.fc((s.a(x) ** 2).mean(1).add(1e-6).sqrt().flatten(1)), True),
    "another tensor divided": (
        lambda s, x: s.c(s.other(x) / (s.a(x) ** 2).mean(1, True).add(1e-6).sqrt()), True),
    "multiplied by the root": (
        lambda s, x: s.c((y := s.a(x)) * (y**2).mean(1, True).add(1e-6).sqrt()), True),
    "a root that is used again": (
        lambda s, x: s.c((y := s.a(x)) / (r := (y**2).mean(1, True).add(1e-6).sqrt())) + r, True),
    "a centre that is used again": (centre_used_again, False),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NORMS)
def test_means_that_are_no_norms_count_removed_slices_as_zeros_or_stay_whole(name):
    forward, free = NO_NORMS[name]
    model = channels_of(forward)
    coupling = couple(model, example(IMAGE))
    assert ("a channels" in [group.name for group in coupling.groups]) == free
    assert_equals_masked(model, example(IMAGE), narrow(model, coupling, some(coupling)))


WEIGHTS = {  # name -> what becomes of a convolution, whether its outputs can go
    "weight norm of a computed direction": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Lengthened()),
        True,
    ),
    "spectral norm": (parametrizations.spectral_norm, False),
    "spectral norm by hooks": (nn.utils.spectral_norm, False),
    "standardised by hand": (lambda layer: parametrize.register_parametrization(layer, "weight", Centred()), True),
}


class Lengthened(nn.Module):
    """A weight norm of twice a direction."""

    def __init__(self):
        super().__init__()
        self.length = nn.Parameter(torch.rand(8, 1, 1, 1) + 1)

    def forward(self, weight):
        return torch._weight_norm(weight * 2, self.length, 0)


class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_inputs_that_the_other_weights_depend_on_stay(name):
    wrap, outputs = WEIGHTS[name]
    layer = nn.Conv2d(8, 8, 3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), wrap(layer), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1))
    model = model.double().eval()
    coupling = couple(model, example(IMAGE))
    assert "the weights that stay would change" in str(coupling.frozen["0.weight", 0])
    assert [group.name for group in coupling.groups] == ["1 channels", "3 channels"][1 - outputs :]
    kept = {group.name: [0, 3, 4] for group in coupling.groups}
    narrowed = narrow(model, coupling, kept).module
    expected = model[1].weight[[0, 3, 4]] if outputs else model[1].weight
    assert torch.allclose(narrowed[1].weight, expected, rtol=1e-9)
    assert_equals_masked(model, example(IMAGE), narrow(model, coupling, kept))


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["parametrized", "by hooks"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_length_of_a_normed_weight_makes_up_for_what_its_direction_loses(wrap, dim):
    layers = nn.Conv2d(3, 8, 3), wrap(nn.Conv2d(8, 8, 3), dim=dim), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 3, 1)
    model = nn.Sequential(*layers).eval()  # in float32, where the new length is rounded
    x = torch.randn(IMAGE)
    with torch.no_grad():
        (model[1].weight_g if "weight_g" in model[1]._parameters else model[1].parametrizations.weight.original0).mul_(
            3
        )
        model(x)  # without gradients: a weight of the older kind can only be copied then
    coupling = couple(model, x)
    assert [group.name for group in coupling.groups] == ["0 channels", "1 channels", "3 channels"]
    kept = {"0 channels": [1, 4, 6, 7], "1 channels": [0, 3, 5]}
    narrowed = narrow(model, coupling, kept, form="module")
    assert narrowed.error < 1e-10
    small = narrowed.module
    assert Narrowing.from_json(json.loads(json.dumps(narrowed.narrowing.to_json()))) == narrowed.narrowing
    with torch.no_grad():
        small(x)
        whole = model[1].weight[[0, 3, 5]][:, [1, 4, 6, 7]]
        assert torch.allclose(small[1].weight, whole, rtol=1e-5, atol=1e-7)
    for before, after in zip(model[1].parameters(), small[1].parameters(), strict=True):
        assert after.ndim == before.ndim, "it is trained on as a length and a direction"
    small(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    with torch.no_grad():  # the narrowing is data: applied to other values, it lengthens by those
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
        model(x)
        other = narrowed.narrowing.apply(model)
        other(x)
        assert torch.allclose(other[1].weight, model[1].weight[[0, 3, 5]][:, [1, 4, 6, 7]], rtol=1e-5, atol=1e-7)


def test_a_length_that_something_else_reads_stays_and_with_it_the_inputs():
    model = randomised(
        Net(
            lambda s, x: s.c(s.b(s.a(x))) * s.b.parametrizations.weight.original0.sum(),
            a=nn.Conv2d(3, 8, 3),
            b=parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
            c=nn.Conv2d(8, 3, 1),
        )
    )
    coupling = couple(model, example(IMAGE))
    assert "a channels" not in [group.name for group in coupling.groups]
    assert narrow(model, coupling, some(coupling)).error < 1e-10


def test_a_rank_inside_a_weight_can_go_and_so_can_features_of_computed_tokens():
    model = randomised(
        Net(
            lambda s, x: s.fc((s.tokens + s.p(s.tokens) + F.linear(s.a(x), s.w + s.up @ s.down)).mean(1)),
            a=nn.Linear(10, 8),
            tokens=nn.Parameter(torch.randn(6, 8)),
            p=nn.Linear(8, 8),
            w=nn.Parameter(torch.randn(8, 8)),
            up=nn.Parameter(torch.randn(8, 4)),
            down=nn.Parameter(torch.randn(4, 8)),
            fc=nn.Linear(8, 3),
        )
    )
    coupling = couple(model, example(TOKENS))
    assert sorted(group.size for group in coupling.groups) == [4, 8, 8]
    assert_equals_masked(model, example(TOKENS), narrow(model, coupling, some(coupling)))


def test_a_group_norm_keeps_as_many_channels_in_every_group():
    model, coupling, narrowed = half(
        Net(lambda s, x: head(s, s.c(s.norm(s.a(x)))), a=nn.Conv2d(3, 12, 3), norm=nn.GroupNorm(3, 12), c=conv(12, 8),
            fc=nn.Linear(8, 3)), IMAGE)  # fmt: skip
    group = coupling.group("a channels")
    assert (group.size, group.granularity) == (4, 3)
    kept = narrowed.narrowing.kept["a channels"]
    assert narrowed.module.a.weight.shape[0] == narrowed.module.norm.num_channels == 3 * len(kept)
    x = example(IMAGE).args[0]
    channels = [4 * g + i for g in range(3) for i in kept]
    middle = F.group_norm(model.a(x)[:, channels], 3, model.norm.weight[channels], model.norm.bias[channels])
    assert torch.allclose(narrowed.module.norm(narrowed.module.a(x)), middle, rtol=1e-9)


def test_attention_with_fewer_dims_keeps_its_temperature():
    build, shape, _ = CONSTRUCTS["fused attention"]
    model = randomised(build())
    coupling = couple(model, example(shape))
    dims = next(group for group in coupling.groups if group.kind == "head dims")
    narrowed = narrow(model, coupling, {dims.name: range(3)})
    assert narrowed.narrowing.form == "graph"
    assert "leaves the scale of attention to the width of a head" in narrowed.narrowing.why
    assert_equals_masked(model, example(shape), narrowed)


def test_whole_heads_go_in_module_form():
    build, shape, _ = CONSTRUCTS["fused attention"]
    model = randomised(build())
    model._forward = None

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.heads = nn.Linear(24, 72), nn.Linear(24, 24), 4

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))

    model = randomised(nn.Sequential(nn.Linear(10, 24), Attention(), nn.Linear(24, 3)))
    coupling = couple(model, example(shape))
    heads = next(group for group in coupling.groups if group.kind == "heads")
    assert (heads.size, heads.granularity) == (4, 18)
    narrowed = narrow(model, coupling, {heads.name: [1, 3]})
    assert narrowed.narrowing.form == "module"
    assert narrowed.narrowing.attributes["1"] == {"heads": 2}
    assert_equals_masked(model, example(shape), narrowed)
