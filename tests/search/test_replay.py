import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from featherweight.edits import Replace
from featherweight.errors import EditError
from featherweight.forms import LowRank, is_layer
from featherweight.search.replay import Replay

Evaluate = Callable[[nn.Module], list[Tensor]]


def low_rank(net: nn.Module, name: str, rank: int = 1) -> Replace:
    """A layer of this rank with random values, the same for the same layer and rank."""
    form = LowRank(rank)
    shapes = form.build(net.get_submodule(name)).state_dict()
    generator = torch.Generator().manual_seed(rank)
    return Replace(name, form, {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in shapes.items()})


def layers_of(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if is_layer(module)]


def answers(*batches: Any) -> Evaluate:
    """All tensors that the model answers these batches with."""

    def evaluate(model: nn.Module) -> list[Tensor]:
        found = []
        with torch.no_grad():
            for batch in batches:
                out = model(**batch) if isinstance(batch, dict) else model(*batch)
                leaves = pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
                found += [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]
        return found

    return evaluate


def check(net: nn.Module, evaluate: Evaluate, layers: Iterable[str] = (), replay: Replay | None = None) -> Replay:
    """Every layer at two ranks, one of them twice: bit by bit the answers of a plain copy with that layer replaced."""
    net.eval()
    replay = replay or Replay(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name in list(layers) or layers_of(net):
        for rank in (1, 2, 1):
            plain = copy.deepcopy(net)
            edit = low_rank(net, name, rank)
            edit.apply(plain)
            with replay.changed(edit) as model:
                replayed = evaluate(model)
            expected = evaluate(plain)
            assert len(expected) == len(replayed) > 0
            for one, other in zip(expected, replayed, strict=True):
                assert torch.equal(one, other), f"{name} at rank {rank}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    return replay


def images(count: int = 3, size: int = 6, batches: int = 2) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(count, 3, size, size, generator=generator),) for _ in range(batches)]


def norm(width: int) -> nn.BatchNorm2d:
    """With statistics that matter."""
    made = nn.BatchNorm2d(width)
    made.running_mean = torch.linspace(-1, 1, width)
    made.running_var = torch.linspace(0.5, 2, width)
    return made


ran: list[str] = []


class Seen(nn.Module):
    """Says that it was run."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        ran.append(self.name)
        return x * 1.5


class Block(nn.Module):
    """A residual block with everything in place that can be."""

    def __init__(self, width: int, stride: int = 1, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)
        self.relu, self.drop = nn.ReLU(inplace=inplace), nn.Dropout()
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.drop(self.relu(self.norm1(self.conv1(F.hardtanh(x, -9, 9)))))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self, inplace: bool = True, blocks: Sequence[int] = (1, 2, 1)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), Seen("stem"), nn.ReLU(inplace=inplace))
        self.blocks = nn.ModuleList([Block(4, stride, inplace) for stride in blocks])
        self.seen = nn.ModuleList([Seen(f"block {i}") for i in range(len(blocks))])
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, seen in zip(self.blocks, self.seen, strict=True):
            x = seen(block(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("inplace", [True, False])
def test_a_residual_network_answers_the_same(inplace: bool) -> None:
    replay = check(Residual(inplace), answers(*images()))
    assert replay.obstacles == {}


def test_what_comes_before_is_not_run_again() -> None:
    net, evaluate = Residual().eval(), answers(*images(batches=1))
    replay = Replay(net)
    with replay.changed(low_rank(net, "blocks.1.conv2")) as model:
        ran.clear()
        evaluate(model)
        assert ran == ["stem", "block 0", "block 1", "block 2"]
    for rank in (2, 3):
        with replay.changed(low_rank(net, "blocks.1.conv2", rank)) as model:
            ran.clear()
            evaluate(model)
            assert ran == ["block 1", "block 2"]
    with replay.changed(low_rank(net, "blocks.2.conv1")) as model:  # a later layer starts from the earlier one's record
        ran.clear()
        evaluate(model)
        assert ran == ["block 1", "block 2"]
        ran.clear()
        evaluate(model)
        assert ran == ["block 2"]
    with replay.changed(low_rank(net, "stem.0")) as model:  # an earlier one does not
        ran.clear()
        evaluate(model)
        assert ran == ["stem", "block 0", "block 1", "block 2"]


def test_any_order_of_layers_is_right() -> None:
    net = Residual()
    replay = check(net, answers(*images()), list(reversed(layers_of(net))))
    check(net, answers(*images()), ["blocks.1.conv2", "stem.0", "head", "blocks.0.conv1", "blocks.1.conv2"], replay)
    assert replay.obstacles == {}


def test_loaders_that_shuffle() -> None:
    net, data = Residual().eval(), torch.randn(12, 3, 6, 6)

    def evaluate(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [model(data[order[i : i + 4]]) for i in (0, 4, 8)]

    replay = Replay(net)
    for turn in range(4):
        order = torch.arange(12).roll(4 * turn) if turn % 2 else torch.randperm(12)
        for name in ("blocks.1.conv1", "head"):
            check(net, evaluate, [name], replay)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_in_either_way(context: Any) -> None:
    net, (batch,) = Residual().eval(), images(batches=1)

    def evaluate(model: nn.Module) -> list[Tensor]:
        with context():
            return [model(*batch).clone()]

    assert check(net, evaluate).obstacles == {}
    replay = Replay(net)  # recorded in one mode, replayed in the other
    with replay.changed(low_rank(net, "head")) as model:
        with torch.inference_mode():
            expected = model(*batch)
        with torch.no_grad():
            assert torch.equal(model(*batch), expected)


class Branches(nn.Module):
    """Concatenation, functional operations, several inputs by keyword, a dict of answers, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.both = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> dict[str, Any]:
        a, b = self.left(left), self.right(right)
        x = F.relu_(self.both(torch.cat([a, F.silu(b)], 1)))
        constant = torch.tensor([0.5]).mul_(scale)
        x = self.twice(F.pad(self.twice(x), (1, 0, 1, 0))[..., 1:, 1:]) * constant
        x.add_(b.repeat(1, 2, 1, 1))
        return {"logits": self.head(x.amax((2, 3))), "features": (a, [x]), "scale": scale}


def test_branches_and_dicts() -> None:
    (one,), (two,) = images()
    calls = [{"left": one, "right": two, "scale": 2.0}, {"right": one, "left": two}, {"left": one, "right": two}]
    replay = check(Branches(), answers(*calls))
    assert replay.obstacles == {}


class PreActivation(nn.Module):
    """Writes in place to what it is given, which others use too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))
        self.last, self.same = nn.Conv2d(4, 2, 1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.0)  # the caller's own tensor
        stem = self.stem(x)
        alias = self.same(stem)
        y = self.body(stem) + stem
        alias -= 0.25
        return self.last(self.conv(y) * stem)


def test_modules_that_write_to_what_they_are_given() -> None:
    replay = check(PreActivation(), answers(*images()))
    assert replay.obstacles == {}


class Rectified(nn.Module):
    """Says that it works in place, and does something else besides."""

    def __init__(self) -> None:
        super().__init__()
        self.inplace, self.scale = True, nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        x.sin_()
        return x * self.scale


class Other(nn.Module):
    """Works in place, but not on its first argument."""

    inplace = True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y.sin_()
        return x


class Early(nn.Module):
    """Reads what it is given before an activation changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        return self.conv(self.relu(x)) * y


class Guest(nn.Module):
    """Calls a layer that it does not contain, and writes to what it computed before."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(4, 4, 1), [layer]

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        y = self.conv(x)
        z = y.exp()
        y += x
        return layer(y) + z


class InPlace(nn.Module):
    """Writes in place after others have read, between, and before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu, self.odd = nn.ReLU(inplace=True), Rectified()
        self.early, self.other = Early(), Other()
        self.inner, self.guest = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(4, 4, 1)), Guest(self.c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "read before":
            y = x.exp()
            return self.c(self.b(self.relu(x))) + y
        if self.kind == "read after":
            y = self.relu(x)
            return self.c(self.b(x)) + x + y
        if self.kind == "not its own":
            return self.c(self.b(self.relu(x + 1.0))) + x
        if self.kind == "a view":
            self.relu(x[:, :2])
            return self.c(self.b(x)) + x
        if self.kind == "twice":
            return self.c(self.b(self.relu(self.relu(x).sub_(0.1))) + x)
        if self.kind == "and more":
            return self.c(self.b(self.odd(x))) + x
        if self.kind == "inside":
            y = self.inner(x) + self.relu(x)
            return self.c(self.b(y) + F.relu_(y))
        if self.kind == "early":
            return self.early(x)
        if self.kind == "other":
            y = self.b(self.relu(x))
            return self.c(self.other(x, y)) + y
        return self.guest(self.b(self.relu(x)), self.c) + x


@pytest.mark.parametrize(
    "kind",
    ["read before", "read after", "not its own", "a view", "twice", "and more", "inside", "early", "other", "guest"],
)
def test_activations_in_place(kind: str) -> None:
    net = InPlace(kind)
    used = [name for name in layers_of(net) if name in ("a", "b", "c") or name.startswith(kind[:5])]
    replay = check(net, answers(*images()), used)
    check(net, answers(*images()), reversed(used), replay)
    assert replay.obstacles == {}


@pytest.mark.parametrize("kind", ["and more", "guest"])
def test_what_is_lost_at_first_is_saved_from_then_on(kind: str) -> None:
    replay = check(InPlace(kind), answers(*images()), ["c"])
    assert (replay.obstacles, replay.bytes > 0) == ({}, True)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.rnn, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def pair(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.conv(x), {"other": self.other(x)}

    def forward(self, x: Tensor) -> Tensor:
        one, more = self.pair(x)
        series = (one + more["other"]).flatten(2).transpose(1, 2)
        outputs, (state, _) = self.rnn(series)
        return self.head(outputs.mean(1) + state[0])


class Stage(nn.Module):
    """Answers with a tuple and a dict; part of it is a view, part is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        y = self.conv(x)
        return y * 2, {"same": x, "halves": y.chunk(2, 1), "size": x.shape[-1], "none": None}


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage, self.next = Stage(), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, more = self.stage(x)
        z = self.next(y) * more["size"] + more["same"]
        more["halves"][0].add_(1.0)
        return z.sum(1) + more["halves"][0].sum(1) + more["halves"][1].sum(1)


class Part(nn.Module):
    """Answers with a tensor that is less than its memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()[:, ::2]


class Twins(nn.Module):
    """Answers with two tensors that are one in memory."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y.flatten()


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.twins = nn.Conv2d(3, 4, 1), Part(), Twins()
        self.last = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.first(x)
        part, (one, other) = self.part(x), self.twins(x)
        last = self.last(part)
        other += 1.0
        return last, one, torch.tensor(part.stride())


class Features(nn.Module):
    """Answers with what it saw on the way, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.a(x)
        return {"last": self.c(self.b(first)), "first": first}


@pytest.mark.parametrize("net", [Nested(), Stages(), Views(), Features()], ids=lambda net: type(net).__name__)
def test_answers_of_many_parts(net: nn.Module) -> None:
    assert check(net, answers(*images())).obstacles == {}


class Output(OrderedDict[str, Any]):
    """An answer as other libraries make them: a dict with attributes, unknown to PyTorch."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(20, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}) for _ in "ab"])
        self.norm = nn.LayerNorm(8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        x, states = self.embed(input_ids) + self.position, []
        for layer in self.layers:
            x = x + layer["down"](F.gelu(layer["up"](self.norm(x))))
            states.append(x)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return Output(last_hidden_state=x, hidden_states=tuple(states))


class Wrapper(nn.Module):
    """A language model as others wrap them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.pooler, self.head = Encoder(), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, **inputs: Tensor) -> Any:
        encoded = self.encoder(**inputs)
        pooled = torch.tanh(self.pooler(encoded.last_hidden_state[:, 0]))
        return {"logits": self.head(pooled), "states": encoded.hidden_states}


def test_a_wrapped_language_model() -> None:
    ids = torch.arange(15).reshape(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 0.0]] * 3)
    assert check(Wrapper(), answers({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask})).obstacles == {}


def test_pytorchs_own_transformer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the nested tensors of its fast path are a prototype
        net = nn.ModuleDict({"a": nn.TransformerEncoder(layer, 2), "b": nn.TransformerEncoderLayer(8, 2, 16)})

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.head = net, nn.Linear(8, 2)

            def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
                return self.head(self.net["b"](self.net["a"](x, src_key_padding_mask=mask)))

        x, mask = torch.randn(3, 5, 8), torch.tensor([[False] * 4 + [True]] * 3)
        model = Model()
        layers = [name for name in layers_of(model) if "out_proj" not in name]
        replay = check(model, answers((x,), (x, mask)), [*layers, *reversed(layers)])
        assert set(replay.obstacles) <= {
            name for name in layers if "layers.0" in name
        }  # whose weights it looks at first
        replay = check(model, answers((x,), (x, mask)), [name for name in reversed(layers) if "layers.0" not in name])
        assert (replay.obstacles, replay.bytes > 0) == ({}, True)


class Choosy(nn.Module):
    """Goes another way for other inputs, before and behind the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.middle, self.last = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.a(x)
        y = self.b(skip) if x.mean() > 0 else skip
        y = self.middle(y)
        if y.mean() > 0:  # only now it turns out who is read
            y = y * skip
        return self.last(y.mean((2, 3))) if y.amax() > 0.5 else y.mean((2, 3))


def test_control_flow_that_depends_on_the_data() -> None:
    torch.manual_seed(3)
    shifted = [(batch + shift,) for (batch,) in images() for shift in (-0.5, 0.5)]
    net = Choosy()
    replay = check(net, answers(*shifted))
    check(net, answers(*shifted), ["middle", "a", "last", "middle"], replay)


switch = {"other way": False}


class Switched(nn.Module):
    """Goes another way for reasons that are nowhere in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(x) if switch["other way"] else self.a(x))


def test_control_flow_that_depends_on_the_world() -> None:
    net, (batch,) = Switched().eval(), images(batches=1)

    def evaluate(model: nn.Module) -> list[Tensor]:
        found = []
        for turn in (False, True, True, False):
            switch["other way"] = turn
            with torch.no_grad():
                found.append(model(*batch))
        return found

    replay = check(net, evaluate, ["last", "a", "last"])
    assert replay.obstacles["last"] == "Diverged: b is called where a was called when it was recorded"


aside: dict[str, Tensor] = {}


class Aside(nn.Module):
    """Passes something on beside its answer."""

    def forward(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        if sizes is None:
            aside["it"] = x.exp()
            return x * 2
        sizes.append(x.shape[0])
        return x


class Asides(nn.Module):
    def __init__(self, by_argument: bool) -> None:
        super().__init__()
        self.by_argument = by_argument
        self.first, self.aside, self.last = nn.Conv2d(3, 3, 1), Aside(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        sizes: list[int] | None = [] if self.by_argument else None
        y = self.last(self.aside(self.first(x), sizes))
        return y * sum(sizes) if sizes is not None else y + aside["it"]


@pytest.mark.parametrize("by_argument", [True, False])
def test_modules_that_pass_things_on_beside_their_answer(by_argument: bool) -> None:
    replay = check(Asides(by_argument), answers(*images()))
    assert ("last" in replay.obstacles) is not by_argument


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


class Stashing(nn.Module):
    """Passes something on by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.exp()
        return x


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.mean((0, 2, 3)))
        return x - self.mean[:, None, None]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape)


class Appending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(0.5)
        return x * len(self.history)


class Around(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Conv2d(3, 3, 1), odd, nn.Conv2d(3, 3, 1)
        self.end = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.odd(self.first(x)))
        stashed = getattr(self.odd, "kept", None)
        return self.end(x) if stashed is None else self.end(x) * stashed


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (Counting(), "keeps something"),
        (Stashing(), "keeps something"),
        (Appending(), "keeps something"),
        (Buffered(), "its own buffers"),
        (Noisy(), "random numbers"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_with_a_memory_or_dice_are_run(odd: nn.Module, why: str) -> None:
    """Every trial starts with the model as it was; within a trial, calls follow one another."""
    net, batches = Around(odd).eval(), images(batches=3)

    def evaluate(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(5)
        with torch.no_grad():
            return [model(*batch) for batch in batches * 2]

    replay = Replay(net)
    for name in ("end", "last", "first", "end"):
        for rank in (1, 2):
            plain = copy.deepcopy(net)
            low_rank(net, name, rank).apply(plain)
            with replay.changed(low_rank(net, name, rank)) as model:
                replayed = evaluate(model)
            assert all(map(torch.equal, evaluate(plain), replayed))
    assert why in replay.obstacles["end"]


def test_noise_behind_the_layer_leaves_the_rest_to_replay() -> None:
    net = Around(Noisy()).eval()
    (batch,) = images(batches=1)

    def evaluate(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(5)
        with torch.no_grad():
            return [model(*batch), torch.rand(2)]

    assert "first" not in check(net, evaluate).obstacles


class Borrowing(nn.Module):
    """Uses the weights of a layer that it calls only later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.later = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.later(self.first(x * self.later.weight.abs().mean()))


def test_weights_used_before_their_layer() -> None:
    replay = check(Borrowing(), answers(*images()), ["first", "later", "first", "later"])
    assert replay.obstacles == {"later": "the layer's weights are used before the layer is called"}


def test_hooks_that_an_evaluation_sets() -> None:
    net, (batch,) = Residual().eval(), images(batches=1)

    def evaluate(model: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []
        inside, outer = model.blocks[0].norm1, model.blocks[1]
        hooks = [
            inside.register_forward_hook(lambda _, given, answer: seen.append(answer * 2)),
            outer.register_forward_pre_hook(lambda _, given: seen.extend(given)),
        ]
        with torch.no_grad():
            logits = model(*batch)
        for hook in hooks:
            hook.remove()
        return [logits, *(tensor.clone() for tensor in seen)]

    net_layers = ["blocks.1.conv1", "blocks.2.conv2", "head"]
    replay = check(net, evaluate, net_layers)
    check(net, answers(batch), net_layers, replay)
    check(net, evaluate, net_layers, replay)
    assert replay.obstacles == {}


def test_evaluations_that_go_their_own_way() -> None:
    net, (batch,) = Residual().eval(), images(batches=1)

    def evaluate(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            whole, stem = model(*batch), model.stem(*batch)  # a part by itself
            double = copy.deepcopy(model).double()(batch[0].double())
        found = [whole, stem, double, model(*batch).detach()]  # with gradients
        with torch.no_grad():
            model.train()
            found.append(model.head(torch.ones(1, 4)))
            model.eval()
            with torch.autocast("cpu", torch.bfloat16):
                found.append(model(*batch))
        return [*found, torch.stack(list(model.parameters())[-1:])]

    check(net, evaluate, ["blocks.1.conv2", "head", "blocks.1.conv2"])


def test_evaluations_that_watch() -> None:
    net, (batch,) = Residual().eval(), images(batches=1)

    def evaluate(model: nn.Module) -> list[Tensor]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*batch)
        with torch.no_grad():
            return [torch.tensor(counter.get_total_flops()), model(*batch)]

    check(net, evaluate, ["blocks.1.conv2", "head"])


def test_evaluations_on_several_threads() -> None:
    net, batches = Residual().eval(), images(batches=6)

    def evaluate(model: nn.Module) -> list[Tensor]:
        with ThreadPoolExecutor(3) as pool:
            return [tensor for found in pool.map(lambda batch: answers(batch)(model), batches * 3) for tensor in found]

    assert check(net, evaluate, ["blocks.0.conv1", "blocks.1.conv2", "head"]).obstacles == {}


def test_what_an_evaluation_does_to_the_model_ends_with_it() -> None:
    net, (batch,) = Residual().eval(), images(batches=1)

    def evaluate(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            before = model(*batch)
            model.stem[0].bias.add_(1.0)
            return [before, model(*batch)]

    check(net, evaluate, ["head", "blocks.0.conv1"])


def test_a_module_that_raises_raises_as_ever() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.conv(x))
            if x.shape[0] == 2:
                raise ValueError("two are too few")
            return y

    net = Failing().eval()
    replay = Replay(net)
    for _ in range(2):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="two are too few"),
            replay.changed(low_rank(net, "last")) as m,
        ):
            m(torch.ones(2, 3, 4, 4))
    check(net, answers(*images()), (), replay)


def test_a_wrong_edit_leaves_the_copy_as_it_was() -> None:
    net = Residual().eval()
    replay = Replay(net)
    with pytest.raises(EditError, match=r"no layer 'stem\.9'"), replay.changed(Replace("stem.9", LowRank(1))):
        pass
    check(net, answers(*images()), ["head"], replay)


def test_gradients_are_said_to_stand_in_the_way() -> None:
    net = Residual().eval()
    replay = Replay(net)
    with replay.changed(low_rank(net, "head")) as model:
        ran.clear()
        model(*images(batches=1)[0]).sum().backward()
        model(*images(batches=1)[0])
    assert ran.count("stem") == 2
    assert "gradients on" in replay.obstacles["head"]


def test_memory_holds_only_what_is_read_and_keeps_to_the_limit() -> None:
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8))).eval()
    batches = images(count=4, size=8, batches=3)
    size = batches[0][0].nbytes
    replay = Replay(net)
    with replay.changed(low_rank(net, "6")) as model:
        answers(*batches)(model)
    assert replay.bytes == 3 * size  # one activation a batch, of the six before the layer

    tight = Replay(net, limit=2 * size)
    check(net, answers(*batches), (), tight)
    assert tight.bytes == 2 * size
    assert str(2 * size) in tight.obstacles["6"]

    following = Replay(net, limit=3 * size)  # the records of one layer, and no room for a second
    check(net, answers(*batches), (), following)
    assert following.bytes == 3 * size
    assert following.obstacles == {}


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A small network of blocks, some of which go round others, write in place, or are used again."""
    kinds = draw(
        st.lists(st.sampled_from(["block", "skip", "concat", "again", "inplace", "view"]), min_size=1, max_size=5)
    )
    torch.manual_seed(draw(st.integers(0, 1000)))

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.parts = nn.ModuleList()
            for kind in kinds:
                wide = nn.Conv2d(8, 4, 1) if kind == "concat" else nn.Conv2d(4, 4, 3, padding=1)
                self.parts.append(Block(4) if kind == "block" else nn.Sequential(wide, norm(4), nn.ReLU(inplace=True)))
            self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = x = self.stem(x)
            for kind, part in zip(kinds, self.parts, strict=True):
                if kind == "block":
                    x = part(x)
                elif kind == "skip":
                    x = part(x) + first
                elif kind == "concat":
                    x = part(torch.cat([x, first], 1))
                elif kind == "again":
                    x = part(part(x)).mul_(0.5)
                elif kind == "inplace":
                    x = part(self.act(x)) - first
                else:
                    x = part(x.view(x.shape))[:, [3, 2, 1, 0]]
            return self.head(x.mean((2, 3)))

    return Drawn().eval()


@given(networks(), st.data())
@settings(max_examples=30, deadline=None)
def test_any_network_and_any_order(net: nn.Module, data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.sampled_from(layers_of(net)), min_size=1, max_size=4))
    assert check(net, answers(*images(count=2)), layers).obstacles == {}
