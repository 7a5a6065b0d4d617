"""HTML pages: about a run, from what it recorded and arrays that the caller hands in; and about a comparison.

Nothing here opens or runs a model: `read_record` reads the run's own files, the caller brings the weights'
values, and `render` returns the page as a string that needs no other file.

```python
from bellbox.report import ReportInput, read_record, render

page = render(ReportInput(record=read_record("runs/small")))
```
"""

from bellbox.report.baselines_page import baselines_page
from bellbox.report.binarized import binarized_page
from bellbox.report.comparison import comparison_pictures
from bellbox.report.comparison_page import comparison_page
from bellbox.report.content import LayerValues, ReportInput, Sample, SizeRow, Verification
from bellbox.report.page import render
from bellbox.report.record import RunRecord, read_record
from bellbox.report.sheet import Picture

__all__ = [
    "LayerValues",
    "Picture",
    "ReportInput",
    "RunRecord",
    "Sample",
    "SizeRow",
    "Verification",
    "baselines_page",
    "binarized_page",
    "comparison_page",
    "comparison_pictures",
    "read_record",
    "render",
]
