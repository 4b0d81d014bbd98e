"""Layers as products of thinner ones."""

from featherweight.factorize.depthwise_separable import DepthwiseSeparable
from featherweight.factorize.spatial_svd import SpatialSVD
from featherweight.factorize.svd import SVD

__all__ = ["SVD", "DepthwiseSeparable", "SpatialSVD"]
