"""What the data says of every layer, and the second-order mathematics that every technique calls."""

from featherweight.curvature.gram import Statistics as Statistics
from featherweight.curvature.gram import gather as gather
from featherweight.curvature.gram import gather_paired as gather_paired
