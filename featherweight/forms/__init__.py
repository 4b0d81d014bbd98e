"""What compressed layers are made of. Loading a file needs these and no technique."""

from featherweight.forms.codebook import Codebook, Shared
from featherweight.forms.constraint import (
    Constrained,
    Constraint,
    Stored,
    beneath,
    constrained_tensors,
    constraints_on,
    parametrized,
    released,
    stored,
)
from featherweight.forms.depthwise import Depthwise, DepthwiseConv
from featherweight.forms.floats import Float, Floating
from featherweight.forms.form import Form, FormModule, Layer, is_layer, without_data
from featherweight.forms.gone import Gone, Removed
from featherweight.forms.grid import Grid, Gridded
from featherweight.forms.low_rank import LowRank
from featherweight.forms.mask import Mask, Masked
from featherweight.forms.pair import ConvPair, LinearPair
from featherweight.forms.pattern import BlockMask, Pattern, Patterned, in_blocks, in_runs, out_of_blocks
from featherweight.forms.projection import Projection, attention_of, layer_at, place, projection, projections
from featherweight.forms.rounding import Rounded, Rounding
from featherweight.forms.separable import Separable
from featherweight.forms.signed_input import SignedInput, WithSignedInput
from featherweight.forms.signs import Binary, Signs, Ternary

__all__ = [
    "Binary",
    "BlockMask",
    "Codebook",
    "Constrained",
    "Constraint",
    "ConvPair",
    "Depthwise",
    "DepthwiseConv",
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
    "Pattern",
    "Patterned",
    "Projection",
    "Removed",
    "Rounded",
    "Rounding",
    "Separable",
    "Shared",
    "SignedInput",
    "Signs",
    "Stored",
    "Ternary",
    "WithSignedInput",
    "attention_of",
    "beneath",
    "constrained_tensors",
    "constraints_on",
    "in_blocks",
    "in_runs",
    "is_layer",
    "layer_at",
    "out_of_blocks",
    "parametrized",
    "place",
    "projection",
    "projections",
    "released",
    "stored",
    "without_data",
]
