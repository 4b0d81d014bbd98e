"""Every test here draws the same numbers whatever ran before it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """One seed for all."""
    torch.manual_seed(0)
