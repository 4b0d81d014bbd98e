"""A model as a PyTorch program file (.pt2), which runs without the model's Python code.

Documented at docs.pytorch.org/docs/stable/export.html.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from featherweight.export.program import quiet


def write(program: ExportedProgram, path: Path) -> tuple[str, ...]:
    """Write a captured program to `path`; there is nothing the reader should know."""
    with quiet(), path.open("wb") as file:  # given a path, torch would have it end in .pt2
        torch.export.save(program, file)
    return ()


def load(path: str | os.PathLike[str]) -> nn.Module:
    """A .pt2 file as a module, to be called as the model was.

    Only load files from a source you trust: a crafted one can run any code. `torch.export.load` (read in torch 2.13)
    unpickles weights and constants that the file marks as pickled with ``weights_only=False``, falls back to that
    wherever a safe load fails, and has no argument to forbid it. Featherweight itself loads only what it just wrote.
    """
    with quiet(), Path(path).open("rb") as file:
        return ProgramModel(torch.export.load(file))


class ProgramModel(nn.Module):
    """A torch.export program as a module, in evaluation mode for good."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module()
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would answer."""
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> ProgramModel:
        """Nothing to switch: the program was captured in evaluation mode."""
        return self
