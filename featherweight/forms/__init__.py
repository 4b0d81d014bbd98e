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
from featherweight.forms.floats import Float, Floating
from featherweight.forms.form import Form, FormModule, Layer, is_layer, without_data
from featherweight.forms.gone import Gone, Removed
from featherweight.forms.grid import Grid, Gridded
from featherweight.forms.low_rank import LowRank
from featherweight.forms.mask import Mask, Masked
from featherweight.forms.pair import ConvPair, LinearPair
from featherweight.forms.separable import Separable
from featherweight.forms.signed_input import SignedInput, WithSignedInput
from featherweight.forms.signs import Binary, Signs, Ternary

__all__ = [
    "Binary",
    "Constrained",
    "Constraint",
    "ConvPair",
    "Float",
    "Floating",
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
    "SignedInput",
    "Signs",
    "Stored",
    "Ternary",
    "WithSignedInput",
    "constrained_tensors",
    "constraints_on",
    "is_layer",
    "released",
    "stored",
    "without_data",
]
