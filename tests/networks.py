"""Small networks of the kinds that techniques meet, each with data to run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import featherweight as fw


class Residual(nn.Module):
    """Convolutions with batch norms around a shortcut, then a classifier: (samples, 3, 8, 8) → (samples, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.one = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.one_norm = nn.BatchNorm2d(24)
        self.two = nn.Conv2d(24, 16, 3, padding=1)
        self.two_norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 20, (3, 5), stride=2, padding=(1, 2), padding_mode="reflect")
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.one_norm(self.one(x)))
        x = torch.relu(x + self.two_norm(self.two(y)))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Transformer(nn.Module):
    """Tokens through attention and a wider layer, then a classifier: (samples, 6) whole numbers → (samples, 5)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, width, bias=False)
        self.keys = nn.Linear(width, width)
        self.values = nn.Linear(width, width)
        self.wide = nn.Linear(width, 3 * width)
        self.back = nn.Linear(3 * width, width)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        weights = (self.queries(x) @ self.keys(x).transpose(1, 2) / 4).softmax(-1)
        x = x + weights @ self.values(x)
        x = x + self.drop(self.back(torch.nn.functional.gelu(self.wide(x))))
        return self.head(x.mean(1))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randint(0, 11, (samples, 6), generator=torch.Generator().manual_seed(5))


class Attention(nn.Module):
    """Attention with six heads beside a shortcut, then a classifier: (samples, 5, 8) → (samples, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 6
        self.embed = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.inward = nn.Linear(16, 3 * 48)
        self.outward = nn.Linear(48, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = self.inward(self.norm(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        seen = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v
        return self.head((x + self.outward(seen.transpose(1, 2).reshape(b, t, -1))).mean(1))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 5, 8, generator=torch.Generator().manual_seed(5))


class Stacked(nn.Module):
    """Blocks with a shortcut each between a stem and a classifier: (samples, 4) → (samples, 3)."""

    class Block(nn.Module):
        """x + f(x)."""

        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.Sequential(*(self.Block() for _ in range(6)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 4, generator=torch.Generator().manual_seed(6))


class Temporal(nn.Module):
    """Convolutions in time, one grouped and one dilated, no classifier: (samples, 4, 20) → (samples, 6, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 12, 5, padding=2)
        self.norm = nn.BatchNorm1d(12)
        self.grouped = nn.Conv1d(12, 16, 3, padding="same", groups=2)
        self.dilated = nn.Conv1d(16, 16, 3, stride=2, padding=2, dilation=2, bias=False)
        self.last = nn.Conv1d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.grouped(x))
        return self.last(torch.relu(self.dilated(x)))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 4, 20, generator=torch.Generator().manual_seed(5))


class Mixed(nn.Module):
    """Two wide layers and a classifier, for tests that need no more: (samples, 12) → (samples, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.second = nn.Linear(24, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    @staticmethod
    def data(samples: int) -> Tensor:
        return torch.randn(samples, 12, generator=torch.Generator().manual_seed(5))


def make(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network as training leaves it: no statistic of a batch norm is 0 or 1; in evaluation mode."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = kind()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.running_var, module.weight):
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
                for tensor in (module.running_mean, module.bias):
                    torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()


def task_of(model: nn.Module, samples: int = 48, **fields: object) -> fw.Task:
    """A task on the network's own data: one sample as example, batches of 16 to calibrate on."""
    data = type(model).data(samples)
    if data.is_floating_point():
        data = data.to(next(model.parameters()).dtype)
    if fields.get("train") is train:
        fields["train"] = partial(train, data=type(model).data(8))
    return fw.Task(**{"example": data[:1], "calibration": data.split(16), **fields})


def train(
    model: nn.Module,
    epochs: float,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    data: Tensor | None = None,
) -> None:
    """A few plain steps, with random numbers in it as every training has; to smaller answers if nothing is said."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = type(model).data(8) if data is None else data
    data = data.to(next(model.parameters()).dtype) if data.is_floating_point() else data
    for _ in range(max(1, round(epochs))):
        optimizer.zero_grad()
        answer = model(data[torch.randperm(len(data))[:4]])
        (answer.square().mean() if loss is None else loss(answer, torch.arange(len(answer)) % 3)).backward()
        optimizer.step()


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    """The same names, types and values to the last bit."""
    mine, its = one.state_dict(), other.state_dict()
    assert list(mine) == list(its)
    for name, tensor in mine.items():
        assert tensor.dtype == its[name].dtype, name
        assert torch.equal(tensor, its[name]), name


NETWORKS: dict[str, type[nn.Module]] = {
    "residual": Residual,
    "transformer": Transformer,
    "attention": Attention,
    "temporal": Temporal,
    "stacked": Stacked,
}
