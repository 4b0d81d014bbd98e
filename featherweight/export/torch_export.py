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

from featherweight.batch import Inputs
from featherweight.export.program import capture, draft, quiet


def export(model: nn.Module, inputs: Inputs, path: str | os.PathLike[str], *, dynamic_batch: bool = True) -> None:
    """Write the model, in evaluation mode, as a .pt2 file.

    Args:
        model: the model; it stays as it is.
        inputs: an example of its inputs, of any batch size; its values are not written.
        path: the file to write; one that exists is replaced only when all has gone well.
        dynamic_batch: whether the file takes batches of any size. Where the model fixes the size, so does the file,
            and a warning says why.

    Raises:
        ExportError: torch.export cannot follow the model, or there is no such folder.
    """
    with draft(path) as file:
        write(capture(model, inputs, dynamic_batch=dynamic_batch), file)


def write(program: ExportedProgram, path: Path) -> None:
    """Write a captured program to `path`."""
    with quiet(), path.open("wb") as file:  # given a path, torch would have it end in .pt2
        torch.export.save(program, file)


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
