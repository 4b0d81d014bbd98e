"""Weight sharing: few values for many weights."""

from featherweight.share.kmeans import KMeans

__all__ = ["KMeans"]
