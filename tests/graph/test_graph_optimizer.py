"""An optimizer that goes on after a narrowing does what one would do that had only ever known the narrowed slices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.graph import GraphError, couple, narrow, narrow_optimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(16, 4, generator=generator)).square().sum().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_goes_on_as_with_the_other_slices_at_zero(make: Any) -> None:
    """Dead units get no gradient: a network in which they are dead trains alike with and without them."""
    gone = [1, 4, 6]
    model, optimizer = trained(make, gone)
    kept = [unit for unit in range(8) if unit not in gone]
    made = narrow(model, couple(model, Inputs((torch.randn(2, 4),))), {"0 neurons": kept})
    narrow_optimizer(optimizer, model, made.module, made.narrowing)
    whole = copy.deepcopy(model)
    steps(made.module, optimizer, 3, seed=2)
    reference, reference_optimizer = trained(make, gone)
    steps(reference, reference_optimizer, 3, seed=2)
    x = torch.randn(5, 4)
    torch.testing.assert_close(made.module(x), reference(x))
    assert not torch.allclose(made.module(x), whole(x)), "nothing was trained"


def trained(make: Any, gone: list[int]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The whole network with its dead units, after the same steps."""
    model = network()
    with torch.no_grad():
        model[0].weight[gone] = 0
        model[0].bias[gone] = -1
        model[2].weight[:, gone] = 0
    optimizer = make(model.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    steps(model, optimizer, 3)
    return model, optimizer


def test_groups_keep_their_settings_and_order() -> None:
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": [*model[2].parameters(), *model[4].parameters()]}],
        0.1,
    )
    made = narrow(model, couple(model, Inputs((torch.randn(2, 4),))), {"0 neurons": [0, 1]})
    narrow_optimizer(optimizer, model, made.module, made.narrowing)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in made.module.parameters()]


def test_anothers_parameters_are_refused_and_nothing_is_changed() -> None:
    model, other = network(), network()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    made = narrow(model, couple(model, Inputs((torch.randn(2, 4),))), {"0 neurons": [0, 1]})
    with pytest.raises(GraphError, match="not the model's"):
        narrow_optimizer(optimizer, model, made.module, made.narrowing)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in other.parameters()]
