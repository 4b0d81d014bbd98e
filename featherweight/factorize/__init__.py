"""Layers as products of thinner ones."""

from featherweight.factorize.spatial_svd import SpatialSVD
from featherweight.factorize.svd import SVD

__all__ = ["SVD", "SpatialSVD"]
