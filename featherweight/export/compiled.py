"""A model for torch.compile, in which oneDNN multiplies the whole numbers that it was quantized to.

PyTorch's compiler finds values of 8 bits that are brought to float in front of a layer, and computes the layer on the
whole numbers (``torch/_inductor/fx_passes/quantization.py``), where weights are constants to it: "freezing".
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.batch import Inputs, mode, tensors_in
from featherweight.errors import ExportError
from featherweight.export.decomposed import INDUCTOR, rewritten
from featherweight.export.program import capture, first_line, quiet
from featherweight.export.quantized import is_quantized, marked
from featherweight.export.verify import LEAST_DB, TOLERANCES, decibels, difference, energies


class CompiledModel(nn.Module):
    """A model as PyTorch's compiler has made it, for inputs of the example's shapes; it answers, and does not train.

    Attributes:
        notes: what of it is computed in floating point all the same, and why.
    """

    def __init__(self, call: Any, example: Inputs, notes: tuple[str, ...]) -> None:
        super().__init__()
        self._call, self._shapes, self.notes = call, _shapes(example), notes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model answers.

        Raises:
            ExportError: the inputs have other shapes than the example.
        """
        if (shapes := _shapes(Inputs(args, kwargs))) != self._shapes:
            raise ExportError(f"compiled for inputs of {self._shapes}, and these have {shapes}: compile anew for them")
        with torch.no_grad():
            return self._call(*args, **kwargs)


def compiled(model: nn.Module, inputs: Inputs) -> CompiledModel:
    """Compile a model with torch.compile, whole numbers and all, and hold its answers against the model's.

    Convolutions over images and Linear layers whose input and weight are rounded to at most 8 bits are multiplied as
    whole numbers by oneDNN; the rest is compiled as it is. It takes a C++ compiler and from seconds to a minute.

    Args:
        model: stays as it is.
        inputs: an example; the compiled model takes inputs of its shapes only.
    Raises:
        ExportError: PyTorch has no oneDNN here, cannot follow or compile the model, or the compiled model answers
            otherwise.
    """
    import torch._inductor.config as settings

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise ExportError("PyTorch has no oneDNN on this machine, which multiplies the whole numbers")
    inputs = inputs.on(model)
    plain, marks = marked(model)
    program, notes = rewritten(capture(plain, inputs, dynamic_batch=False), marks, INDUCTOR)
    with torch.no_grad(), mode(model, training=False):
        expected = inputs.into(model)
        try:
            with settings.patch(freezing=True), quiet(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=DeprecationWarning)  # of what the compiler itself imports
                made = CompiledModel(torch.compile(program.module(check_guards=False)), inputs, notes)
                given = inputs.into(made)
        except Exception as error:  # the compiler may raise anything, a missing C++ compiler's message among them
            raise ExportError(f"torch.compile cannot compile {type(model).__name__}: {first_line(error)}") from error
    if is_quantized(model):
        agrees = min((decibels(*pair) for pair in energies(given, expected)), default=LEAST_DB) >= LEAST_DB
    else:
        kind = tensors_in(expected)[0].dtype
        agrees = difference(given, expected) <= TOLERANCES.get(kind, TOLERANCES[torch.float32])
    if not agrees:
        raise ExportError(f"compiled, {type(model).__name__} answers otherwise than before on {inputs}")
    return made


def _shapes(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in inputs.tensors() if isinstance(tensor, Tensor))
