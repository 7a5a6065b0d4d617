"""What a training loop of one's own does for a low-bit model; `bellbox train` does the same.

```python
optimizer = torch.optim.AdamW(bb.optim.parameter_groups(model, lr=1e-3, weight_decay=0.1))
optimizer = bb.optim.hyperball(optimizer, model, lr=0.02, every=16)      # if you like: CEWT around it
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
...
optimizer.step()
bb.optim.refit_codebooks(model, bb.optim.second_moments(optimizer), step)     # of k-means alone
```

- `parameter_groups`: no decay on scales, norms, biases and embeddings; scales that learn at a rate of their own.
- `hyperball`: the weights keep their norm and become exactly Gaussian now and then (`cewt.py` says why), around any
  optimizer of torch, which stays the object that it is.
- `CEWT`: the same around several optimizers at once, with the rate given at each step.
- `pull_to_codes`: before a step, weights a share of the way to what their codes stand for.
- `refit_codebooks`: codebooks fitted to the weights as they are now.
"""

from bellbox.optim.cewt import CEWT, constrained_weights, head_weights, normal_scores, project_
from bellbox.optim.codebooks import add_squared_gradients, refit_codebooks, second_moments
from bellbox.optim.groups import multiplies, parameter_groups, scale_gradients_by_row
from bellbox.optim.hyperball import hyperball, project_weights
from bellbox.optim.pull import bin_means, pull_to_codes

__all__ = [
    "CEWT",
    "add_squared_gradients",
    "bin_means",
    "constrained_weights",
    "head_weights",
    "hyperball",
    "multiplies",
    "normal_scores",
    "parameter_groups",
    "project_",
    "project_weights",
    "pull_to_codes",
    "refit_codebooks",
    "scale_gradients_by_row",
    "second_moments",
]
