"""From a table of options and a budget to a plan. Search knows no technique."""

from featherweight.search.budget import Budget
from featherweight.search.optimal import Optimal
from featherweight.search.options import Choosing, Option, Plan, Selector, Table, Trials

__all__ = ["Budget", "Choosing", "Optimal", "Option", "Plan", "Selector", "Table", "Trials"]
