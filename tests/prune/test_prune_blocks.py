"""Depth pruning: what nobody would miss goes first, and what is left runs, saves and loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import BudgetError, NoEffect, RecipeError
from featherweight.forms import Gone, Removed
from featherweight.prune import Blocks
from featherweight.prune.blocks import removable


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def network(weights: tuple[float, ...] = (1.0, 0.001, 0.3)) -> nn.Sequential:
    """A stem, residual blocks whose branches weigh more or less, and a head."""
    torch.manual_seed(0)
    blocks = [Residual(8) for _ in weights]
    for block, weight in zip(blocks, weights, strict=True):
        with torch.no_grad():
            for parameter in block.branch[2].parameters():
                parameter.mul_(weight)
    return nn.Sequential(nn.Linear(4, 8), *blocks, nn.Linear(8, 3)).eval()


def task(**more: Any) -> fw.Task:
    images = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return fw.Task(images[:1], calibration=images.split(16), **more)


def removed(compressed: fw.Compressed) -> list[str]:
    return [edit["layer"] for edit in compressed.ledger.steps[0].edits]


def test_the_block_that_does_least_goes_first() -> None:
    model = network()
    for count, gone in ((1, {"2"}), (2, {"2", "3"}), (3, {"1", "2", "3"})):
        small = fw.compress(model, Blocks(count=count), task=task())
        blocks = {name.partition(".")[0] for name in removed(small)}
        assert blocks == gone
        assert small.ledger.after.total.macs < small.ledger.before.total.macs


def test_a_block_that_others_read_attributes_of_stays_and_is_listed() -> None:
    """PyTorch's encoder looks into its first layer, so that only the others can go."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, 3)).eval()
    data = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(1))
    small = fw.compress(model, Blocks(count=1, ignore=("1",)), task=fw.Task(data[:1], calibration=data.split(4)))
    assert removed(small)[0] in ("1.layers.1", "1.layers.2")
    left = small.ledger.steps[0].left["1.layers.0"]
    assert left.startswith("the network does not run without it: ")
    assert "self_attn" in left


def test_of_a_block_the_input_stays_and_of_a_branch_zeros() -> None:
    """Both say the same here: without the branch, x + 0; without the block, x."""
    model = network((1.0,))
    small = fw.compress(model, Blocks(count=1), task=task())
    stem, head = model[0], model[-1]
    x = torch.randn(5, 4)
    torch.testing.assert_close(small.model(x), head(stem(x)))


def test_a_budget_is_met_and_what_it_cost_is_true() -> None:
    model = network()
    small = fw.compress(model, Blocks(budget=fw.Budget(params=0.7)), task=task())
    count = sum(p.numel() for p in small.model.parameters())
    assert count <= 0.7 * sum(p.numel() for p in model.parameters())
    assert small.ledger.after.total.params == count
    whole = fw.compress(model, Blocks(budget=fw.Budget(params=0.2, macs=0.3)), task=task())
    assert len({n.partition(".")[0] for n in removed(whole)}) == 3


def test_a_budget_below_what_must_stay_is_an_error() -> None:
    with pytest.raises(BudgetError, match=r"cannot be met by removing blocks: .* params still come to"):
        fw.compress(network(), Blocks(budget=fw.Budget(params=0.01)), task=task())


def test_more_than_there_are_are_all_and_the_record_says_so() -> None:
    small = fw.compress(network(), Blocks(count=99), task=task())
    assert "only 3 blocks could be removed" in small.ledger.steps[0].notes


def test_what_cannot_go_has_its_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
            self.twice = nn.Sequential(nn.Linear(6, 6))
            self.kept = nn.Sequential(nn.Linear(6, 6))
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.pair(self.kept(self.twice(self.twice(self.grow(x)))))
            return a + b

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    able, left = removable(Mixed(), fw.Task(torch.randn(2, 4)), ignore=("kept",))
    assert able == []
    assert left == {
        "grow": "it makes [2, 6] of [2, 4]",
        "twice": "it is called more than once",
        "kept": "ignored, as asked",
        "pair": "it does not give one tensor for one",
    }


def test_a_network_without_blocks_says_so() -> None:
    with pytest.warns(NoEffect, match="changed nothing"):
        fw.compress(nn.Sequential(nn.Linear(4, 3)), Blocks(count=1), task=task())


def test_saved_and_loaded_it_answers_alike(tmp_path: Any) -> None:
    model = network()
    small = fw.compress(model, Blocks(count=2), task=task())
    small.save(tmp_path / "small.fw")
    x = torch.randn(5, 4)
    loaded = fw.load(tmp_path / "small.fw", into=network((1.0, 1.0, 1.0))).model
    assert torch.equal(loaded(x), small.model(x))
    assert any(isinstance(module, Gone) for module in loaded.modules())


def test_a_stand_in_gives_its_first_input_or_zeros() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(Removed().build(nn.Linear(3, 3))(x, "mask", more=1), x)
    assert not Removed(zeros=True).build(nn.Linear(3, 3))(x).any()
    assert str(Removed()) == "removed"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Blocks(), "give one of budget= and count="),
        (Blocks(count=1, budget=fw.Budget(macs=0.5)), "give one of budget= and count="),
        (Blocks(count=0), "count is 0: at least one block goes"),
        (Blocks(budget=fw.Budget(macs=0.5, drop=0.1)), "a drop is no limit"),
        (Blocks(count=1, ignore=("nowhere",)), "'nowhere' matches none"),
        (Blocks(count=1, epochs=1), r"epochs needs Task\(train="),
        (Blocks(count=1, samples=0), "samples must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_cannot_be_used_are_named(step: Blocks, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fw.compress(network(), step, task=task())
