"""The same network with initial values: what a new generation, or a peer, begins as."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def start_anew(model: nn.Module) -> list[str]:
    """Draw new initial values for all parameters that are trained, in place, and reset batch norms' statistics.

    Returns:
        The names of modules that keep their values: those that do not know how to begin anew (they have no
        ``reset_parameters``), and those whose weights are constrained.
    """
    kept = []
    for name, module in model.named_modules():
        trained = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if parametrize.is_parametrized(module):
            kept.append(name)
        elif trained and len(trained) == len(list(module.parameters(recurse=False))):
            begin = getattr(module, "reset_parameters", None)
            if not callable(begin):
                if ".parametrizations." not in f"{name}.":  # of a layer that is named already
                    kept.append(name)
                continue
            begin()
        elif trained:  # one of its parameters is not to change, and a reset would change all
            kept.append(name)
    return kept
