"""Baselines that people know, each through its own package, as rows of one table at their true bytes.

`job` says what all rows share, `baseline` what a row is, `registry` which there are; each package has one small file.
`runner` runs what is missing, a process a row (`worker`), `measure` takes the numbers, `lines` keeps them, and `table`
draws them. A row whose package is not here, or that it refuses, is skipped with the reason in its place.
"""

from bellbox.comparison.baselines.baseline import Baseline
from bellbox.comparison.baselines.job import Job
from bellbox.comparison.baselines.lines import Line, Lines
from bellbox.comparison.baselines.registry import baseline_of, names
from bellbox.comparison.baselines.runner import Progress, run_baselines

__all__ = ["Baseline", "Job", "Line", "Lines", "Progress", "baseline_of", "names", "run_baselines"]
