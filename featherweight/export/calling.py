"""A file of another runtime as a module that is called, and answers, as the model that it was made from."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.batch import describe
from featherweight.errors import ExportError

METADATA = "featherweight"  # the key, in files, of what other formats have no place for: how the model is called


class FileModel(nn.Module):
    """A file, answering in its runtime: it has no parameters, no gradients, and no training mode.

    It takes tensors as positional or keyword arguments and returns tensors in the structure the model returned them in;
    files that others wrote, and structures JSON cannot hold, give a single tensor or a tuple. Floating-point inputs are
    brought to the type the file asks for.

    Args:
        path: the file.
        inputs: types by input name.
        call: how the model is called and answers, as `METADATA` holds it; None for files of others.
        dynamic_batch: whether the file takes batches of any size.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inputs: Mapping[str, torch.dtype],
        call: Mapping[str, Any] | None,
        dynamic_batch: bool,
    ) -> None:
        super().__init__()
        call = call or {"arguments": list(inputs), "fixed": {}, "structure": None}
        self.path, self.inputs, self.dynamic_batch = os.fspath(path), dict(inputs), dynamic_batch
        self.arguments: Sequence[str] = call["arguments"]
        self.fixed: Mapping[str, str] = call["fixed"]
        self.structure = pytree.treespec_loads(call["structure"]) if call["structure"] else None
        self.present: Sequence[bool] = call.get("present", ())
        self.eval()

    @abstractmethod
    def run(self, arrays: Mapping[str, Any]) -> Sequence[Any]:
        """The runtime's answers to arrays by input name, as arrays in the order of the outputs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the runtime answers.

        Raises:
            ExportError: the arguments are not the file's inputs, or set what was fixed when the file was written.
        """
        answers = [torch.from_numpy(array) for array in self.run(self.arrays(args, kwargs))]
        if self.structure is not None:
            tensors = iter(answers)
            return pytree.tree_unflatten([next(tensors) if there else None for there in self.present], self.structure)
        return answers[0] if len(answers) == 1 else tuple(answers)

    def arrays(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays to run with, by input name: keywords by theirs, positional ones by the names left, in order."""
        given = dict(leaves(dict(kwargs))) if kwargs else {}
        names = [name for name in self.arguments if name not in given]
        positional = pytree.tree_leaves(args)
        given |= zip(names, positional, strict=False)
        for name, value in given.items():
            absent = value is None and name not in self.fixed
            if name not in self.inputs and not absent and self.fixed.get(name) != repr(value):
                raise ExportError(f"{self._takes()}: {name}={shown(value)} would need another export")
        if len(positional) > len(names):
            raise ExportError(f"{self._takes()}, but was given {len(positional)} positional arguments")
        if missing := [name for name in self.inputs if given.get(name) is None]:
            raise ExportError(f"{self._takes()}, but was not given {', '.join(missing)}")
        return {name: self._array(name, given[name]) for name in self.inputs}

    def _array(self, name: str, value: Any) -> Any:
        wanted = self.inputs[name]
        if not isinstance(value, Tensor):
            raise ExportError(f"{self._takes()}, but was given {name}={value!r}")
        if value.dtype != wanted and value.is_floating_point() and wanted.is_floating_point:
            value = value.to(wanted)
        return value.detach().cpu().numpy()

    def _takes(self) -> str:
        fixed = "".join(f", with {name}={value} fixed" for name, value in self.fixed.items())
        return f"{os.path.basename(self.path)} takes the tensors {', '.join(self.inputs)}{fixed}"


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """Everything in nested containers, named by its keys: ``{"state": (h, c)}`` gives state_0 and state_1."""
    return [
        ("_".join(re.findall(r"\w+", pytree.keystr(path))), leaf)
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
    ]


def shown(value: Any) -> str:
    """An argument in a few words."""
    return describe(value) if isinstance(value, Tensor) else repr(value)
