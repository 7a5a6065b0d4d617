"""Comparing methods fairly: one grid file in; runs, tables and pictures out.

`grid` reads what is to be compared, `plan` says which run comes next, `process` and `worker` train it in a process of
its own, `results` keeps what came out, `selection` which of it belongs to the grid, `summary` boils that down to one
line a method, `differences` says how far two methods are apart. Nothing here knows a quantizer: a row of a grid is any
set of training keys.
"""

from bellbox.comparison.grid import Cell, Grid, load_grid
from bellbox.comparison.results import Result, Results
from bellbox.comparison.runner import Outcome, run_grid
from bellbox.comparison.summary import Summary, summarise

__all__ = [
    "Cell",
    "Grid",
    "Outcome",
    "Result",
    "Results",
    "Summary",
    "load_grid",
    "run_grid",
    "summarise",
]
