"""What every factorization of a layer into two factors has in common: rank as the one choice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from featherweight.cost.cost import Cost
from featherweight.cost.count import LayerCall, price
from featherweight.curvature.gram import Statistics
from featherweight.factorize.blocks import Factors, balanced, blocks, factors, least_losses, predicted_losses, refit
from featherweight.factorize.replacing import Replacing
from featherweight.forms import ConvPair, Form, Layer, LinearPair
from featherweight.layers import PerLayer, for_layer
from featherweight.mend import corrected_bias
from featherweight.search.options import Option
from featherweight.task import Task


@dataclass(frozen=True)
class Factorization(Replacing):
    """A layer as two thinner ones.

    Attributes:
        rank: the rank itself, instead of a ratio or a budget; per layer where it is a mapping.
        multiple_of: round ranks up to a multiple that the hardware likes; per layer where it is a mapping.
    """

    rank: PerLayer[int] | None = None
    multiple_of: PerLayer[int] = 1

    @abstractmethod
    def form(self, rank: int) -> Form:
        """The form of that rank."""

    @abstractmethod
    def first_axes(self, layer: Layer) -> Collection[int]:
        """The kernel axes that the first factor runs along."""

    def ways(self) -> dict[str, Any]:
        return {**super().ways(), "rank": self.rank}

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        for name, setting in (("rank", self.rank), ("multiple_of", self.multiple_of)):
            for value in setting.values() if isinstance(setting, Mapping) else [setting]:
                if isinstance(value, int) and value < 1:  # another type is among the problems already
                    found.append(f"{name} is {value}: it must be at least 1")
        return found

    def decided(self, name: str, options: Sequence[Option], whole: Cost) -> Option | None:
        if self.rank is None:
            return super().decided(name, options, whole)
        rank = for_layer(self.rank, name, default=0)
        if not rank:
            return None
        wanted = self.form(self._rounded(name, rank))
        found = next((o for o in options if o.form == wanted), None)
        if found is None:
            raise LookupError(f"{wanted} is none of its options, {options[0]} to {options[-1]}")
        return found

    def priced(self, name: str, layer: Layer, calls: Sequence[LayerCall]) -> list[Option]:
        weight = blocks(layer.weight, groups(layer), self.first_axes(layer), None).weight
        full = min(weight.shape[1] * weight.shape[2], weight.shape[3])
        costs = costs_by_rank([price(self.form(r).build(layer, "meta"), calls) for r in (1, 2)], full)
        ranks = {min(self._rounded(name, r), full) for r in range(1, full + 1)}
        return [Option(name, self.form(r), costs[r], 0.0) for r in sorted(ranks)]

    def losses(self, layer: Layer, options: Sequence[Option], seen: Statistics | None) -> list[float]:
        # A bias that is corrected takes care of the means; without data it is not.
        seen = seen if seen is None or layer.bias is None or self.data_aware is False else seen.centred()
        known = blocks(layer.weight, groups(layer), self.first_axes(layer), seen)
        if self.data_aware is False:
            losses = predicted_losses(known, factors(replace(known, gram=None, gradients=None))).tolist()
        else:
            losses = least_losses(known).tolist()
        return [losses[option.form.rank] for option in options]  # type: ignore[union-attr]

    def _rounded(self, name: str, rank: int) -> int:
        step = for_layer(self.multiple_of, name, default=1)
        return -(-rank // step) * step

    def values(self, layer: Layer, form: Form, seen: Statistics | None) -> Mapping[str, Tensor]:
        """Fitted factors, balanced so that they can be trained on, and the bias that goes with them."""
        rank: int = form.rank  # type: ignore[attr-defined]
        fitted = seen if seen is None or layer.bias is None else seen.centred()
        known = blocks(layer.weight, groups(layer), self.first_axes(layer), fitted)
        found = balanced(refit(known, factors(known).truncated(rank)))
        pair = cast(LinearPair | ConvPair, form.build(layer))
        with torch.no_grad():
            fill(pair, found)
            if layer.bias is not None and pair.second.bias is not None:
                bias = layer.bias if seen is None else corrected_bias(layer.weight, layer.bias, pair.weight, seen)
                pair.second.bias.copy_(bias)
        return pair.state_dict()


def groups(layer: Layer) -> int:
    """The groups of a convolution; 1 for a Linear."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def fill(pair: LinearPair | ConvPair, of: Factors) -> None:
    """Write factors into a pair of layers, in place.

    Args:
        pair: a LinearPair or ConvPair of the same rank.
        of: first (groups, rank, v), second (groups, outputs, u, rank).
    """
    first, second = pair.first.weight, pair.second.weight
    # v is (inputs, first axes), u the second axes: in both weights in that order, with axes of length 1 between.
    first.copy_(of.first.reshape(first.shape))
    second.copy_(of.second.transpose(2, 3).reshape(second.shape))


def costs_by_rank(of_one_and_two: Sequence[Cost], ranks: int) -> list[Cost]:
    """What every rank from 0 to `ranks` costs: a pair of factors grows by the same with every rank.

    Args:
        of_one_and_two: the costs of rank 1 and of rank 2.
        ranks: the greatest rank.
    """
    one, two = of_one_and_two
    each = two - one
    return [
        replace(
            one,
            macs=one.macs + (r - 1) * each.macs,
            params=one.params + (r - 1) * each.params,
            bytes=one.bytes + (r - 1) * each.bytes,
            activation_bytes=one.activation_bytes + (r - 1) * each.activation_bytes,
        )
        for r in range(ranks + 1)
    ]
