"""Terms that a training objective can be given besides the task's own loss.

```python
from bellbox.objectives import FeatureHook, mec_loss

features = FeatureHook(model, "lm_head", side="input")
loss = task_loss(model(x)) + 0.1 * mec_loss(features.take())
```
"""

from bellbox.objectives.features import FeatureCollector, FeatureHook, pooled
from bellbox.objectives.gather import gather_rows
from bellbox.objectives.mec import coding_length, mec_loss, normalised, spectrum, two_view_loss

__all__ = [
    "FeatureCollector",
    "FeatureHook",
    "coding_length",
    "gather_rows",
    "mec_loss",
    "normalised",
    "pooled",
    "spectrum",
    "two_view_loss",
]
