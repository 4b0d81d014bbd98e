"""What compressed layers are made of. Loading a file needs these and no technique."""

from featherweight.forms.depthwise import Depthwise, DepthwiseConv
from featherweight.forms.form import Form, FormModule, Layer, is_layer
from featherweight.forms.gone import Gone, Removed
from featherweight.forms.low_rank import LowRank
from featherweight.forms.pair import ConvPair, LinearPair
from featherweight.forms.separable import Separable

__all__ = [
    "ConvPair",
    "Depthwise",
    "DepthwiseConv",
    "Form",
    "FormModule",
    "Gone",
    "Layer",
    "LinearPair",
    "LowRank",
    "Removed",
    "Separable",
    "is_layer",
]
