"""What compressed layers are made of. Loading a file needs these and no technique."""

from featherweight.forms.constraint import (
    Constrained,
    Constraint,
    Stored,
    constrained_tensors,
    constraints_on,
    released,
    stored,
)
from featherweight.forms.form import Form, FormModule, Layer, is_layer, without_data
from featherweight.forms.gone import Gone, Removed
from featherweight.forms.grid import Grid, Gridded
from featherweight.forms.low_rank import LowRank
from featherweight.forms.mask import Mask, Masked
from featherweight.forms.pair import ConvPair, LinearPair
from featherweight.forms.separable import Separable

__all__ = [
    "Constrained",
    "Constraint",
    "ConvPair",
    "Form",
    "FormModule",
    "Gone",
    "Grid",
    "Gridded",
    "Layer",
    "LinearPair",
    "LowRank",
    "Mask",
    "Masked",
    "Removed",
    "Separable",
    "Stored",
    "constrained_tensors",
    "constraints_on",
    "is_layer",
    "released",
    "stored",
    "without_data",
]
