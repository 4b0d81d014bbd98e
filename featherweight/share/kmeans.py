"""Weight sharing: the weights of a layer take 2^b values, found by k-means, and a weight is stored as b bits.

Han et al., Deep Compression, 2016, section 3, arxiv.org/abs/1510.00149: centroids evenly between the least and the
greatest weight to begin with, then k-means, then training, in which a centroid's gradient is the sum of its weights'.
Beyond the paper, squared distances are weighed by the curvature of the loss (Choi et al., Towards the limit of network
quantization, 2017, section 3, arxiv.org/abs/1612.01543), and each weight's error is made up for by those that have not
been given a value yet (Frantar et al., GPTQ, 2023, arxiv.org/abs/2210.17323).

For runtimes that look weights up in a table, and files. A uniform grid with entropy coding makes files smaller still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featherweight.cost.confined import confined
from featherweight.cost.cost import Cost
from featherweight.cost.count import LayerCall, price
from featherweight.curvature import sweeps
from featherweight.curvature.gram import Statistics
from featherweight.curvature.rounding import swept
from featherweight.edits import Constrain, Edit
from featherweight.forms import Codebook, Form, Layer, Shared, beneath, constraints_on
from featherweight.layers import PerLayer, for_layer, without_values
from featherweight.layerwise import Layerwise
from featherweight.mend import corrected_bias
from featherweight.search.options import Option
from featherweight.share.clusters import Init, kmeans, nearest
from featherweight.step import Stage
from featherweight.study import Study
from featherweight.task import Task

WIDTHS = range(1, 9)


@dataclass(frozen=True)
class KMeans(Layerwise):
    """Give the weights of Linear and Conv layers 2^bits values, layer by layer.

    Attributes:
        data_aware: weigh weights by the curvature; None for wherever there is calibration data.
        epochs: of fine-tuning with ``task.train`` afterwards, which trains centroids, biases and norms.
        bits: of an index, 1 to 8, instead of a budget; per layer where it is a mapping.
        init: where centroids begin: ``"linear"``, ``"density"``, ``"random"`` or ``"k-means++"``.
        vector: neighbouring weights of an output that share an index; per layer where it is a mapping.
        channels: outputs that share a table; 0 for a table a layer; per layer where it is a mapping.
        product: a table for every place of a vector among an output's weights (product quantization).
        feedback: let weights make up for each other's errors, column by column; needs calibration data.
        gradients: what moves a centroid while this step trains. ``"mean"``, of its weights' gradients, goes with the
            learning rate that the network was trained at; ``"sum"``, the exact gradient, as in the paper, needs one
            that is lower by about as many times as weights share a centroid.
        rounds: of k-means, at most.
    """

    bits: PerLayer[int] | None = None
    init: Init = "linear"
    vector: PerLayer[int] = 1
    channels: PerLayer[int] = 0
    product: bool = False
    feedback: bool = True
    gradients: Literal["mean", "sum"] = "mean"
    rounds: int = 200

    stage: ClassVar[Stage] = Stage.VALUES
    inside_forms: ClassVar[bool] = True
    metric: ClassVar[str] = "bytes"

    # Settings -------------------------------------------------------------------------------------------------------

    def ways(self) -> dict[str, Any]:
        return {"budget": self.budget, "bits": self.bits, **super().ways()}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        for name, least, most in (
            ("bits", 1, 8),
            ("vector", 1, 1 << 20),
            ("channels", 0, 1 << 20),
            ("rounds", 1, 1 << 20),
        ):
            setting = getattr(self, name)
            for value in setting.values() if isinstance(setting, Mapping) else [setting]:
                if isinstance(value, int) and not least <= value <= most:
                    limit = f"from {least} to {most}" if name == "bits" else f"at least {least}"
                    found.append(f"{name} is {value}: it must be {limit}")
        if self.product and self.channels:
            found.append("product= has a table for every place and channels= one for so many outputs: give one of them")
        return found

    # Choosing -------------------------------------------------------------------------------------------------------

    def unfit(self, layer: Layer) -> str | None:
        return without_values(layer)

    def form(self, name: str, layer: Layer, bits: int) -> Codebook:
        """A layer's codebook of so many bits."""
        vector = for_layer(self.vector, name, default=1)
        zero = bool((layer.weight.detach() == 0).any())
        return Codebook(1 << bits, vector, for_layer(self.channels, name, default=0), self.product, zero)

    def priced(self, name: str, layer: Layer, calls: Sequence[LayerCall]) -> list[Option]:
        whole = price(layer, calls)
        forms = [self.form(name, layer, bits) for bits in WIDTHS]
        reasons = [self._reason(layer, form) for form in forms]
        able = [form for form, reason in zip(forms, reasons, strict=True) if reason is None]
        if not able:
            raise LookupError(reasons[0])
        return [Option(name, form, confined(whole, layer, form), 0.0) for form in able]

    def _reason(self, layer: Layer, form: Codebook) -> str | None:
        """Why a layer cannot have a codebook; None where it can."""
        if (reason := form.reason_against(layer.weight.shape)) is not None:
            return reason
        zeros = _vectors(layer.weight.detach(), form) == 0
        if form.vector > 1 and bool((zeros.any(2) & ~zeros.all(2)).any()):
            return (
                f"single zeros would not stay zero in vectors of {form.vector}: prune in blocks of (1, {form.vector})"
            )
        least = min(int((~zeros[table].all(2)).sum()) for table in _tables(zeros.shape, layer, form))
        if form.size > least:
            return f"{form.size} centroids are more than the {least} values that share a table"
        return None

    def decided(self, name: str, options: Sequence[Option], whole: Cost) -> Option | None:
        assert self.bits is not None
        bits = for_layer(self.bits, name, default=0)
        if not bits:
            return None
        found = next((o for o in options if cast(Codebook, o.form).size == 1 << bits), None)
        if found is None:
            raise LookupError(f"{1 << bits} centroids would not make it smaller: the most that do are {options[-1]}")
        return found

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        of = sweeps.of_layer(layer, seen)
        found = []
        for option in options:
            form = cast(Codebook, option.form)
            # Without feedback, which takes longer than the rest and makes all options better alike.
            aware = self.data_aware is not False
            centroids, indices = replace(self, feedback=False).shared(of, layer, form, aware)
            built = _filled(layer, form, centroids, indices)
            found.append(sweeps.loss(of, built.weight.detach().double().reshape(of.weight.shape)))
        return found

    def edits(self, study: Study) -> Iterator[Edit]:
        """As of any step by layer; tables that are there already learn by means while the step trains."""
        with ExitStack() as stack:
            for edit in super().edits(study):
                yield edit
                if isinstance(edit, Constrain) and self.gradients == "mean":
                    held = study.model.get_submodule(edit.layer)
                    shared = cast(Shared, constraints_on(held, edit.constraint.tensor)[-1])
                    if shared.centroids.requires_grad:
                        stack.callback(_by_means(shared).remove)

    # Fitting --------------------------------------------------------------------------------------------------------

    def shared(self, of: sweeps.Matrix, layer: Layer, form: Codebook, aware: bool = True) -> tuple[Tensor, Tensor]:
        """The tables (tables, size, vector), and every vector's code (outputs, vectors)."""
        gone = (layer.weight.detach() == 0).reshape(of.weight.shape)
        weight = of.weight.masked_fill(gone, 0)
        if (
            of.gram is not None
            and bool(gone.any())
            and not torch.equal(weight, layer.weight.detach().reshape(weight.shape))
        ):
            weight = sweeps.refit(of.weight, sweeps.steady(of), ~gone, weight)
        matters = sweeps.diagonal(of) if aware else torch.ones_like(weight)
        vectors = _vectors(weight.reshape(layer.weight.shape), form)
        each = _vectors(matters.reshape(layer.weight.shape), form).mean(2)
        stay = ~_vectors(gone.reshape(layer.weight.shape), form).all(2)
        centroids = torch.zeros(form.tables(layer.weight.shape), form.size, form.vector, dtype=torch.float64)
        codes = torch.zeros(vectors.shape[:2], dtype=torch.long)
        for index, table in enumerate(_tables(vectors.shape, layer, form)):
            there = stay[table]
            found, at = kmeans(vectors[table][there], each[table][there], form.size, self.init, rounds=self.rounds)
            centroids[index] = found
            codes[table] = codes[table].masked_scatter(there, at + int(form.zero))
        if self.feedback and aware and of.gram is not None and form.vector == 1:
            codes = self._fed_back(of, layer, form, centroids, gone)
        return centroids, codes

    def _fed_back(self, of: sweeps.Matrix, layer: Layer, form: Codebook, centroids: Tensor, gone: Tensor) -> Tensor:
        """The codes column by column, every weight's error made up for by the columns behind it."""
        shape = layer.weight.shape
        table = form.table_of(shape).expand(shape[0], -1).expand(shape[0], shape[1:].numel()).reshape(gone.shape)
        codes = torch.zeros_like(gone, dtype=torch.long)

        def centroid(part: Tensor, columns: Tensor) -> Tensor:
            of_table, found = table[..., columns], torch.zeros_like(part)
            code = torch.zeros_like(of_table)
            for index in torch.unique(of_table).tolist():
                here = of_table == index
                at = nearest(part[here][:, None], centroids[index])
                code[here], found[here] = at + int(form.zero), centroids[index, at, 0]
            codes[..., columns] = code.masked_fill(gone[..., columns], 0)
            return found

        swept(of.weight, sweeps.steady(of), centroid, gone)
        return codes.reshape(shape[0], -1)

    def values(self, layer: Layer, form: Form, seen: Statistics | None) -> Mapping[str, Tensor]:
        form = cast(Codebook, form)
        built = _filled(layer, form, *self.shared(sweeps.of_layer(layer, seen), layer, form, aware=seen is not None))
        with torch.no_grad():
            if layer.bias is not None and built.bias is not None and seen is not None:
                built.bias.copy_(corrected_bias(layer.weight, layer.bias, built.weight, seen))
        return built.state_dict()


def _by_means(shared: Shared) -> RemovableHandle:
    """Divide each centroid's gradient by the number of weights that share it, until the handle is removed."""
    places = (shared.table * shared.form.size + shared.indices.long() - int(shared.form.zero)).flatten()
    places = places[(shared.indices.flatten() > 0) | (not shared.form.zero)]
    counts = torch.bincount(places, minlength=shared.centroids.shape[:2].numel()).clamp_min(1)
    counts = counts.reshape(*shared.centroids.shape[:2], 1)
    divided = lambda gradient: gradient / counts.to(gradient)  # noqa: E731 - the hook is no more than this
    return cast(RemovableHandle, shared.centroids.register_hook(divided))  # type: ignore[no-untyped-call]


def _vectors(weight: Tensor, form: Codebook) -> Tensor:
    """(outputs, vectors an output, vector)."""
    return weight.reshape(weight.shape[0], -1, form.vector)


def _tables(vectors: torch.Size, layer: Layer, form: Codebook) -> list[tuple[slice, slice]]:
    """The outputs and places that share each table."""
    outputs, places = vectors[:2]
    if form.product:
        return [(slice(None), slice(place, place + 1)) for place in range(places)]
    step = form.channels or outputs
    return [(slice(first, first + step), slice(None)) for first in range(0, outputs, step)]


def _filled(layer: Layer, form: Codebook, centroids: Tensor, codes: Tensor) -> Layer:
    """A copy of the layer with these tables and codes on its weight."""
    built = cast(Layer, form.build(layer))
    shared = cast(Shared, constraints_on(built)[-1])
    with torch.no_grad():
        shared.centroids.copy_(centroids)
        shared.indices.copy_(codes)
        beneath(built).copy_(built.weight)
    return built
