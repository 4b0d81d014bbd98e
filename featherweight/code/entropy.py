"""The bytes that a tensor takes at least where each value is coded by nothing but how often it comes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.code.tensors import Elements, elements_of


def entropy_bytes(values: Tensor) -> float:
    """Shannon's bound of order 0, in bytes: of whole numbers as they are, of floats summed over their bytes.

    Args:
        values: of any shape and type.
    """
    if not values.numel():
        return 0.0
    if values.dtype == torch.bool or not (values.is_floating_point() or values.is_complex()):
        return _bits(values.cpu().flatten().to(torch.int64).numpy()) / 8
    found: Elements = elements_of(values.detach().cpu().contiguous())
    planes = found.reshape(-1, 1).view(np.uint8)
    return sum(_bits(planes[:, place]) for place in range(planes.shape[1])) / 8


def _bits(values: NDArray[np.integer]) -> float:
    _, counts = np.unique(values, return_counts=True)
    return float((counts * np.log2(len(values) / counts)).sum())
