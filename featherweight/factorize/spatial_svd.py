"""Spatial SVD: a convolution along one axis, then along the others; k×1 then 1×k in two dimensions.

Jaderberg, Vedaldi & Zisserman, Speeding up convolutional neural networks with low rank expansions, 2014,
arxiv.org/abs/1405.3866, scheme 2. Plain (``data_aware=False``) it is the truncated SVD of the kernel seen as (inputs ·
height, outputs · width), as AIMET's users know it. Data-aware, that matrix is whitened by what the layer sees and by
the loss's gradients, its second factor refitted by least squares over the whole patch, and each layer fitted to the
original's answers on what the compressed layers before it give (Zhang et al., Accelerating very deep convolutional
networks, 2016, arxiv.org/abs/1505.06798).

Helps with k×k kernels. MACs fall more than time does: two thin convolutions keep a processor less busy than one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from featherweight.factorize.factorization import Factorization
from featherweight.forms import Form, Layer, Separable
from featherweight.task import Task


@dataclass(frozen=True)
class SpatialSVD(Factorization):
    """Replace convolutions by one along `axis` and one along the other axes.

    Attributes:
        axis: the kernel axis of the first factor; 0 is time in one dimension, height in two, depth in three.
    """

    axis: int = 0

    def problems(self, model: nn.Module, task: Task) -> list[str]:
        found = super().problems(model, task)
        return [*found, f"axis is {self.axis}: it must be 0, 1 or 2"] if self.axis not in (0, 1, 2) else found

    def unfit(self, layer: Layer) -> str | None:
        if isinstance(layer, nn.Linear):
            return "a Linear layer has no kernel to take apart: factorize.SVD can replace it"
        if self.axis >= len(layer.kernel_size):
            return f"its kernel has no axis {self.axis}"
        return None

    def form(self, rank: int) -> Form:
        return Separable(rank, self.axis)

    def first_axes(self, layer: Layer) -> Collection[int]:
        return (self.axis,)
