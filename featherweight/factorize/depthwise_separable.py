"""Depthwise-separable rewriting: a regular convolution as the layers of a MobileNet, started from what it knows.

Guo et al., Network decoupling: from regular to depthwise separable convolutions, 2018, arxiv.org/abs/1808.05517:
channel by channel the kernel is a matrix of outputs by k×k, whose SVD gives the best sum of any number of terms.
Data-aware, that SVD is whitened by what the channel sees and by the loss's gradients, and both factors are then
refitted in turn, by least squares under the whole Gram matrix, so that channels make up for one another.

One term costs 1/N + 1/k² of the layer: 8 to 9 times less for 3×3 kernels. It also loses most, so train afterwards, best
with `distill.Response`. Two terms and more lose less and save little time: other factorizations do better there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.cost.cost import Cost
from featherweight.cost.count import LayerCall, price
from featherweight.curvature.gram import Statistics
from featherweight.curvature.solve import damp, least_squares
from featherweight.factorize.blocks import GRADIENT_DAMPING, RIDGE, Blocks, factors
from featherweight.factorize.replacing import Replacing
from featherweight.forms import Depthwise, Form, Layer
from featherweight.layers import PerLayer, for_layer
from featherweight.mend import corrected_bias
from featherweight.search.options import Option
from featherweight.task import Task

# Rounds of refitting one factor and then the other.
SWEEPS = 3
# Unknown kernel values of one group above which kernels stay as the SVD gave them: their fit takes the cube of it.
MOST_UNKNOWN = 4096


@dataclass(frozen=True)
class DepthwiseSeparable(Replacing):
    """Replace convolutions by a k×k one for every channel and a 1×1 one across channels, or by a sum of several.

    Attributes:
        terms: how many such pairs make up a layer, instead of a ratio or a budget; per layer where it is a mapping.
    """

    terms: PerLayer[int] | None = None

    def ways(self) -> dict[str, Any]:
        return {**super().ways(), "terms": self.terms}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        for value in self.terms.values() if isinstance(self.terms, Mapping) else [self.terms]:
            if isinstance(value, int) and value < 1:
                found.append(f"terms is {value}: it must be at least 1")
        return found

    def unfit(self, layer: Layer) -> str | None:
        if isinstance(layer, nn.Linear):
            return "a Linear layer has no kernel to take apart: factorize.SVD can replace it"
        if torch.Size(layer.kernel_size).numel() == 1:
            return "its kernel is of one position: there is nothing to separate"
        return "it is depthwise already" if layer.groups == layer.in_channels else None

    def decided(self, name: str, options: Sequence[Option], whole: Cost) -> Option | None:
        if self.terms is None:
            return super().decided(name, options, whole)
        terms = for_layer(self.terms, name, default=0)
        if not terms:
            return None
        found = next((o for o in options if o.form == Depthwise(terms)), None)
        if found is None:
            raise LookupError(f"{Depthwise(terms)} is none of its options, {options[0]} to {options[-1]}")
        return found

    def priced(self, name: str, layer: Layer, calls: Sequence[LayerCall]) -> list[Option]:
        assert not isinstance(layer, nn.Linear)
        outputs = layer.out_channels // layer.groups
        most = min(torch.Size(layer.kernel_size).numel(), outputs)
        forms = [Depthwise(terms) for terms in range(1, most + 1)]
        return [Option(name, form, price(form.build(layer, "meta"), calls), 0.0) for form in forms]

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        seen = seen if seen is None or layer.bias is None or self.data_aware is False else seen.centred()
        known = Decoupling(layer, seen)
        fitted = known if self.data_aware is not False else Decoupling(layer, None)
        found = []
        for option in options:
            kernels, mixing = fitted.factors(option.form.terms)  # type: ignore[union-attr]
            # Choosing needs no more than the order of the options: the mixing alone is refitted, as it is cheap.
            mixing = fitted.mixed(kernels, mixing)
            found.append(known.loss(kernels, mixing))
        return found

    def values(self, layer: Layer, form: Form, seen: Statistics | None) -> Mapping[str, Tensor]:
        """Fitted factors of equal size, and the bias that goes with them."""
        assert isinstance(form, Depthwise)
        known = Decoupling(layer, seen if seen is None or layer.bias is None else seen.centred())
        kernels, mixing = known.fitted(form.terms)
        made = form.build(layer)
        with torch.no_grad():
            made.first.weight.copy_(kernels.reshape(made.first.weight.shape))
            made.second.weight.copy_(mixing.reshape(made.second.weight.shape))
            if layer.bias is not None and made.bias is not None:
                bias = layer.bias if seen is None else corrected_bias(layer.weight, layer.bias, made.weight, seen)
                made.bias.copy_(bias)
        return made.state_dict()


class Decoupling:
    """A convolution's weight and statistics, channel by channel.

    Kernels are (groups, channels, terms, k) and mixings (groups, outputs, channels, terms), with k the kernel's
    positions, and channels and outputs those of a group.

    Args:
        layer: the convolution.
        seen: statistics of its inputs, or None to go without data. Where they hold a cross moment, the weight is first
            moved to where it best answers the changed inputs as the original answered its own.
    """

    def __init__(self, layer: Layer, seen: Statistics | None) -> None:
        assert not isinstance(layer, nn.Linear)
        groups, channels = layer.groups, layer.in_channels // layer.groups
        flat = layer.weight.detach().double().reshape(groups, layer.out_channels // groups, -1)
        self.gram: Tensor | None = None  # (groups, channels · k, channels · k)
        self.gradients: Tensor | None = None  # (groups, outputs, outputs)
        self.positions = 1.0
        if seen is not None:
            self.gram, self.positions = damp(seen.gram.to(flat.device), 1e-6), seen.positions
            if seen.cross is not None:
                flat = least_squares(seen.gram, seen.cross, RIDGE, prior=flat).to(flat)
            if seen.gradients is not None:
                size = len(seen.gradients) // groups
                parts = [seen.gradients[g * size :, g * size :][:size, :size] for g in range(groups)]
                self.gradients = damp(torch.stack(parts), GRADIENT_DAMPING).to(flat.device)
        self.weight = flat.reshape(*flat.shape[:2], channels, -1)  # (groups, outputs, channels, k)

    def fitted(self, terms: int) -> tuple[Tensor, Tensor]:
        """The SVD's factors, refitted in turn, and balanced."""
        kernels, mixing = self.factors(terms)
        mixing = self.mixed(kernels, mixing)
        for _ in range(SWEEPS if self.gram is not None else 0):
            if kernels[0].numel() > MOST_UNKNOWN:
                break
            kernels = self.shaped(kernels, mixing)
            mixing = self.mixed(kernels, mixing)
        # Kernel and mixing of every term of the same size, so that both can be trained on.
        sizes = kernels.norm(dim=3), mixing.norm(dim=1)
        scale = (sizes[1] / sizes[0].clamp_min(1e-30)).sqrt().clamp_min(1e-30)
        return kernels * scale[..., None], mixing / scale[:, None]

    def factors(self, terms: int) -> tuple[Tensor, Tensor]:
        """Channel by channel the best of so many terms, as if channels had nothing to do with one another."""
        groups, outputs, channels, k = self.weight.shape
        each = self.weight.permute(0, 2, 1, 3).reshape(groups * channels, outputs, 1, k)
        gram = gradients = None
        if self.gram is not None:
            blocks = self.gram.reshape(groups, channels, k, channels, k).diagonal(dim1=1, dim2=3)  # (g, k, k, channels)
            gram = blocks.permute(0, 3, 1, 2).reshape(groups * channels, 1, k, 1, k)
        if self.gradients is not None:
            gradients = self.gradients.repeat_interleave(channels, 0)
        found = factors(Blocks(each, gram, gradients)).truncated(terms)
        kernels = found.first.reshape(groups, channels, -1, k)
        mixing = found.second.reshape(groups, channels, outputs, -1).transpose(1, 2)
        return kernels, mixing

    def mixed(self, kernels: Tensor, mixing: Tensor) -> Tensor:
        """The best mixing for these kernels, under the whole Gram matrix; a ridge holds it near where it was."""
        if self.gram is None:
            return mixing
        groups, channels, terms, k = kernels.shape
        gram = self.gram.reshape(groups, channels, k, channels, k)
        half = torch.einsum("gctk,gckdl->gctdl", kernels, gram)
        seen = torch.einsum("gctdl,gdsl->gctds", half, kernels).reshape(groups, channels * terms, -1)
        cross = torch.einsum("godl,gctdl->goct", self.weight, half).reshape(groups, mixing.shape[1], -1)
        found = least_squares(seen, cross, RIDGE, mixing.reshape(cross.shape))
        return found.to(kernels).reshape(mixing.shape)

    def shaped(self, kernels: Tensor, mixing: Tensor) -> Tensor:
        """The best kernels for this mixing: least squares of (channels · terms · k) unknowns, all outputs at once."""
        assert self.gram is not None
        groups, channels, terms, k = kernels.shape
        gram = self.gram.reshape(groups, channels, k, channels, k)
        weighed = mixing if self.gradients is None else torch.einsum("gpo,goct->gpct", self.gradients, mixing)
        between = torch.einsum("goct,gods->gctds", weighed, mixing)
        whole = torch.einsum("gctds,gckdl->gctkdsl", between, gram).reshape(groups, channels * terms * k, -1)
        answers = torch.einsum("godl,gckdl->gock", self.weight, gram)
        wanted = torch.einsum("goct,gock->gctk", weighed, answers).reshape(groups, 1, -1)
        prior = kernels.reshape(groups, 1, -1)
        return least_squares(whole, wanted, RIDGE, prior).to(kernels).reshape(kernels.shape)

    def loss(self, kernels: Tensor, mixing: Tensor) -> float:
        """The predicted rise of the loss, ½ tr(A ΔW G ΔWᵀ) · positions; without gradients, or data, as a share."""
        left = (self.weight - torch.einsum("goct,gctk->gock", mixing, kernels)).flatten(2)
        whole = self.weight.flatten(2)

        def size(of: Tensor) -> Tensor:
            right = of if self.gram is None else of @ self.gram
            over = right if self.gradients is None else self.gradients @ right
            return (over * of).sum().clamp_min(0)

        if self.gradients is None:
            return float(size(left) / size(whole).clamp_min(torch.finfo(whole.dtype).tiny))
        return float(size(left)) * 0.5 * self.positions
