"""Small networks, one structural hazard each, and the original with slices set to zero to compare them with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.batch import Inputs
from featherweight.graph import Coupling, Narrowed, Narrowing, couple, narrow

IMAGE, WIDE_IMAGE, TOKENS = (2, 3, 8, 8), (2, 12, 8, 8), (2, 6, 10)


class Net(nn.Module):
    """Named parts and a forward, so that a construct is one expression."""

    def __init__(self, forward: Callable[..., Tensor], **parts: object) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: object) -> nn.Sequential:
    """A convolution with its norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode, with values that do not happen to be 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            positive = name.endswith("running_var") or "norm" in name or (tensor.ndim == 1 and name.endswith("weight"))
            tensor.copy_(drawn + 0.5 if positive else (drawn - 0.5) / max(1, tensor[0].numel()) ** 0.5 * 2)
    return model


def example(shape: tuple[int, ...], seed: int = 0) -> Inputs:
    return Inputs((torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),))


def some(coupling: Coupling, seed: int = 0, share: float = 0.5) -> dict[str, list[int]]:
    """Units to keep: about a share of every group, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, round(group.size * share))].tolist()
        for group in coupling.groups
    }


class Times(nn.Module):
    """A mask as a parametrization."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def masked(model: nn.Module, narrowing: Narrowing) -> nn.Module:
    """A copy of the model with the slices that the narrowing cuts set to zero."""
    model = copy.deepcopy(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, dims in narrowing.tensors.items():
            layer, computed, part = name.partition(".parametrizations.weight.")
            if computed and part not in ("original", "original1"):
                continue
            kept = torch.ones(tensors[name].shape, dtype=torch.bool)
            for d, indices in dims.items():
                gone = [i for i in range(tensors[name].shape[d]) if i not in set(indices)]
                kept.index_fill_(d, torch.tensor(gone), False)
            if computed:  # it is the weight that has zeros: a direction of them would be 0 / 0
                parametrize.register_parametrization(model.get_submodule(layer), "weight", Times(kept), unsafe=True)
            elif tensors[name].is_floating_point():
                tensors[name].mul_(kept)
    return model


def assert_equals_masked(model: nn.Module, inputs: Inputs, narrowed: Narrowed) -> None:
    """On the example and on a longer batch of other values, and no slower way round: eager against narrowed."""
    reference = masked(model, narrowed.narrowing)
    for given in (inputs, example((5, *inputs.args[0].shape[1:]), seed=1)):
        expected, answer = reference(*given.args), narrowed.module(*given.args)
        assert answer.shape == expected.shape
        assert torch.allclose(answer, expected, rtol=1e-9, atol=1e-10), (answer - expected).abs().max()


def half(model: nn.Module, shape: tuple[int, ...], **settings: object) -> tuple[nn.Module, Coupling, Narrowed]:
    """The model made of random values, coupled, and narrowed to about half of every group."""
    model = randomised(model)
    inputs = example(shape)
    coupling = couple(model, inputs)
    return model, coupling, narrow(model, coupling, some(coupling), **settings)


def attention(self: nn.Module, x: Tensor) -> Tensor:
    """Fused queries, keys and values, four heads, a residual around it."""
    x = self.embed(x)
    b, t, _ = x.shape
    q, k, v = self.qkv(x).reshape(b, t, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
    made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
    return self.head((x + self.proj(made)).mean(1))


def shuffled(self: nn.Module, x: Tensor) -> Tensor:
    x = self.b(self.a(x))
    n, c, h, w = x.shape
    return head(self, self.c(x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)))


def head(self: nn.Module, x: Tensor) -> Tensor:
    return self.fc(x.mean((2, 3)))


def repeated_keys(self: nn.Module, x: Tensor) -> Tensor:
    """Four query heads share two key heads, with rotated halves."""
    x = self.embed(x)
    b, t, _ = x.shape
    q = self.q(x).view(b, t, 4, 6).transpose(1, 2)
    k, v = (layer(x).view(b, t, 2, 6).transpose(1, 2) for layer in (self.k, self.v))
    rotated = torch.cat([-k[..., 3:], k[..., :3]], -1)
    k = k * self.cos + rotated * self.cos
    k, v = (y[:, :, None].expand(b, 2, 2, t, 6).reshape(b, 4, t, 6) for y in (k, v))
    weights = (q @ k.transpose(2, 3) * 6**-0.5).softmax(-1)
    return self.head(self.o((weights @ v).transpose(1, 2).reshape(b, t, 24)).mean(1))


# name -> network, shape of its input, names of the layers whose outputs are narrowed
CONSTRUCTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "flatten": (
        lambda: Net(lambda s, x: s.fc(s.h(s.a(x).flatten(1)).relu()), a=conv(3, 8), h=nn.Linear(512, 6),
            fc=nn.Linear(6, 3)),
        IMAGE, {"a.0", "h"},
    ),
    "flatten channels last": (
        lambda: Net(
            lambda s, x: s.fc(s.h(s.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1)).relu()),
            a=conv(3, 8), h=nn.Linear(512, 6), fc=nn.Linear(6, 3)),
        IMAGE, {"a.0", "h"},
    ),
    "channel shuffle": (
        lambda: Net(shuffled, a=conv(3, 8), b=conv(8, 16, 1, groups=4), c=conv(16, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "b.0", "c.0"},
    ),
    "pixel shuffle": (
        lambda: Net(lambda s, x: head(s, s.b(F.pixel_shuffle(s.a(x), 2))), a=conv(3, 16), b=conv(4, 8),
            fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "b.0"},
    ),
    "pixel unshuffle": (
        lambda: Net(lambda s, x: head(s, s.b(F.pixel_unshuffle(s.a(x), 2))), a=conv(3, 4), b=conv(16, 8),
            fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "b.0"},
    ),
    "parts by chunk": (
        lambda: Net(
            lambda s, x: head(s, s.c(torch.cat([*(y := s.a(x).chunk(2, 1)), s.b(y[1])], 1))),
            a=conv(3, 12), b=conv(6, 6), c=conv(18, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "b.0", "c.0"},
    ),
    "parts by split sizes": (
        lambda: Net(
            lambda s, x: head(s, s.b((y := s.a(x).split([4, 8], 1))[0]) + s.c(y[1])),
            a=conv(3, 12), b=conv(4, 8), c=conv(8, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "b.0", "c.0"},
    ),
    "parts by slices": (
        lambda: Net(
            lambda s, x: head(s, s.b((y := s.a(x))[:, :5]) + s.c(y[:, 5:])),
            a=conv(3, 12), b=conv(5, 8), c=conv(7, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "b.0", "c.0"},
    ),
    "one tensor twice in a cat": (
        lambda: Net(
            lambda s, x: head(s, s.c(torch.cat([y := s.a(x), F.avg_pool2d(y, 3, 1, 1)], 1))),
            a=conv(3, 8), c=conv(16, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "c.0"},
    ),
    "a residual": (
        lambda: Net(lambda s, x: head(s, (y := s.a(x)) + s.b(y)), a=conv(3, 8), b=conv(8, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "b.0"},
    ),
    "a layer called twice": (
        lambda: Net(lambda s, x: head(s, s.b(s.b(s.a(x)))), a=conv(3, 8), b=conv(8, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "b.0"},
    ),
    "bare parameters": (
        lambda: Net(
            lambda s, x: head(s, s.c(F.conv2d(s.a(x), s.w, s.bias, padding=1).relu() * s.scale)),
            a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 3, 3)), bias=nn.Parameter(torch.randn(6)),
            scale=nn.Parameter(torch.randn(1, 6, 1, 1)), c=conv(6, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "c.0", ""},
    ),
    "depthwise": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.d(s.a(x)))), a=conv(3, 8), d=conv(8, 8, groups=8), c=conv(8, 6),
            fc=nn.Linear(6, 3)),
        IMAGE, {"a.0", "c.0"},
    ),
    "depthwise with a multiplier": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.d(s.a(x)))), a=conv(3, 8), d=conv(8, 16, groups=8), c=conv(16, 6),
            fc=nn.Linear(6, 3)),
        IMAGE, {"a.0", "c.0"},
    ),
    "grouped": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.d(s.a(x)))), a=conv(3, 8), d=conv(8, 12, groups=2), c=conv(12, 6),
            fc=nn.Linear(6, 3)),
        IMAGE, {"a.0", "d.0", "c.0"},
    ),
    "transposed": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.u(s.a(x)))),
            a=conv(3, 8), u=nn.ConvTranspose2d(8, 6, 2, 2), c=conv(6, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "u", "c.0"},
    ),
    "transposed and grouped": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.u(s.a(x)))),
            a=conv(3, 8), u=nn.ConvTranspose2d(8, 12, 2, 2, groups=4), c=conv(12, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "u", "c.0"},
    ),
    "transposed and depthwise": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.u(s.a(x)))),
            a=conv(3, 8), u=nn.ConvTranspose2d(8, 8, 2, 2, groups=8), c=conv(8, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "c.0"},
    ),
    "one and three dimensions": (
        lambda: Net(
            lambda s, x: s.fc(s.c(s.a(x.flatten(2)).relu().unflatten(2, (4, 4, 4))).flatten(2).mean(2)),
            a=nn.Conv1d(3, 8, 3, padding=1), c=nn.Conv3d(8, 6, 3), fc=nn.Linear(6, 3)),
        IMAGE, {"a", "c"},
    ),
    "instance norm and pools": (
        lambda: Net(
            lambda s, x: head(s, s.c(F.max_pool2d(F.adaptive_avg_pool2d(s.norm(s.a(x)), 6), 2))),
            a=nn.Conv2d(3, 8, 3), norm=nn.InstanceNorm2d(8, affine=True), c=conv(8, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a", "c.0"},
    ),
    "prelu and squeeze-excitation": (
        lambda: Net(
            lambda s, x: head(s, s.c((y := s.act(s.a(x))) * s.up(s.down(y.mean((2, 3),
                keepdim=True)).relu()).sigmoid())),
            a=conv(3, 8), act=nn.PReLU(8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), c=conv(8, 8),
            fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "down", "up", "c.0"},
    ),
    "gated": (
        lambda: Net(lambda s, x: head(s, s.c(F.glu(s.a(x), 1))), a=conv(3, 12), c=conv(6, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "c.0"},
    ),
    "padded and enlarged": (
        lambda: Net(
            lambda s, x: head(s, s.c(F.pad(F.interpolate(s.a(x), scale_factor=2), (1, 1, 0, 0, 2, 1)))),
            a=conv(3, 8), c=conv(11, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "c.0"},
    ),
    "a constant index": (
        lambda: Net(
            lambda s, x: head(s, s.c(torch.index_select(s.a(x), 1, s.order))),
            a=conv(3, 8), order=nn.Buffer(torch.tensor([7, 1, 3, 5, 0, 2, 4, 6, 1])), c=conv(9, 8), fc=nn.Linear(8,
                3)),
        IMAGE, {"a.0", "c.0"},
    ),
    "weight norm": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.b(s.a(x)).relu())), a=conv(3, 8),
            b=nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3)), c=conv(6, 8), fc=nn.Linear(8, 3)),
        IMAGE, {"a.0", "c.0", "b"},
    ),
    "fused attention": (
        lambda: Net(
            attention, embed=nn.Linear(10, 24), qkv=nn.Linear(24, 72), proj=nn.Linear(24, 24), head=nn.Linear(24, 3)),
        TOKENS, {"embed", "qkv", "proj"},
    ),
    "shared keys and rotary halves": (
        lambda: Net(
            repeated_keys, embed=nn.Linear(10, 24), q=nn.Linear(24, 24), k=nn.Linear(24, 12), v=nn.Linear(24, 12),
            o=nn.Linear(24, 24), head=nn.Linear(24, 3), cos=nn.Buffer(torch.randn(6))),
        TOKENS, {"embed", "q", "k", "v", "o"},
    ),
    "einsum": (
        lambda: Net(
            lambda s, x: s.head(torch.einsum("btd,bsd->bts", s.a(x), s.b(x)).softmax(-1) @ s.c(x)).mean(1),
            a=nn.Linear(10, 8), b=nn.Linear(10, 8), c=nn.Linear(10, 6), head=nn.Linear(6, 3)),
        TOKENS, {"a", "b", "c"},
    ),
    "matrix products": (
        lambda: Net(
            lambda s, x: torch.addmm(s.bias, torch.bmm(s.a(x), s.b(x).transpose(1, 2)).mean(1), s.w),
            a=nn.Linear(10, 8), b=nn.Linear(10, 8), w=nn.Parameter(torch.randn(6, 3)),
            bias=nn.Parameter(torch.randn(3))),
        TOKENS, {"a", "b"},
    ),
    "token and position": (
        lambda: Net(
            lambda s, x: s.head(torch.cat([s.token.expand(x.shape[0], -1, -1), s.a(x)], 1).add(s.position)[:,
                0] + s.b(x).sum(1)),
            a=nn.Linear(10, 8), b=nn.Linear(10, 8), token=nn.Parameter(torch.randn(1, 1, 8)),
            position=nn.Parameter(torch.randn(1, 7, 8)), head=nn.Linear(8, 3)),
        TOKENS, {"a", "b", ""},
    ),
    "mixing tokens": (
        lambda: Net(
            lambda s, x: s.head((s.two(s.one(s.a(x).transpose(1, 2)).relu()).transpose(1, 2)).mean(1)),
            a=nn.Linear(10, 8), one=nn.Linear(6, 12), two=nn.Linear(12, 6), head=nn.Linear(8, 3)),
        TOKENS, {"a", "one", "two"},
    ),
    "stacked and unbound": (
        lambda: Net(
            lambda s, x: s.head(sum(torch.stack([s.a(x), s.b(x).movedim(1, 1)], 1).unbind(1)).mean(1)),
            a=nn.Linear(10, 8), b=nn.Linear(10, 8), head=nn.Linear(8, 3)),
        TOKENS, {"a", "b"},
    ),
    "repeated": (
        lambda: Net(
            lambda s, x: s.head(torch.cat([s.a(x).repeat(1, 1, 2), s.b(x).repeat_interleave(2, 2)], -1).mean(1)),
            a=nn.Linear(10, 8), b=nn.Linear(10, 4), head=nn.Linear(24, 3)),
        TOKENS, {"a", "b"},
    ),
    "chosen and filled": (
        lambda: Net(
            lambda s, x: s.head(torch.where(x[..., :1] > 0, s.a(x), s.b(x)).masked_fill(x[..., 1:2] > 0, 0.0).mean(1)),
            a=nn.Linear(10, 8), b=nn.Linear(10, 8), head=nn.Linear(8, 3)),
        TOKENS, {"a", "b"},
    ),
    "recurrent": (
        lambda: Net(
            lambda s, x: s.head(s.gru(s.lstm(s.a(x))[0])[0][:, -1]), a=nn.Linear(10, 8),
            lstm=nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True),
            gru=nn.GRU(12, 6, batch_first=True), head=nn.Linear(6, 3)),
        TOKENS, {"a", "lstm", "gru"},
    ),
}  # fmt: skip
