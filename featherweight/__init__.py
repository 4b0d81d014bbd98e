"""Featherweight: make a trained network cheaper to run, and prove that it still does its job."""

from featherweight import factorize as factorize
from featherweight.artifact import open as open
from featherweight.compact import resolutions as resolutions
from featherweight.compact import widen as widen
from featherweight.compressed import Compressed as Compressed
from featherweight.compressed import load as load
from featherweight.inspection import compare as compare
from featherweight.inspection import inspect as inspect
from featherweight.inspection import inspect_file as inspect_file
from featherweight.packing import pack as pack
from featherweight.packing import unpack as unpack
from featherweight.recipe import Recipe as Recipe
from featherweight.recipe import compress as compress
from featherweight.search.budget import Budget as Budget
from featherweight.search.greedy import Greedy as Greedy
from featherweight.search.optimal import Optimal as Optimal
from featherweight.search.options import Plan as Plan
from featherweight.sensitivity import Sensitivity as Sensitivity
from featherweight.sensitivity import sensitivity as sensitivity
from featherweight.task import Task as Task
from featherweight.train.fit import fit as fit

__version__ = "0.1.0"
