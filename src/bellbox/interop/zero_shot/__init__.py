"""Zero-shot tasks through lm-eval, for anything that maps token ids to logits.

Needs the extra `lm-eval`.

```python
from bellbox.interop.zero_shot import BellboxLM, zero_shot

lm = BellboxLM(model, Path("tokenizer.json"), longest=512)
print(zero_shot(lm, ["piqa", "arc_easy"]).scores)
```
"""

from bellbox.errors import require

require("lm_eval", "lm-eval")

from bellbox.interop.zero_shot.adapter import BellboxLM  # noqa: E402  (its absence is one line)
from bellbox.interop.zero_shot.run import TaskScore, ZeroShot, zero_shot  # noqa: E402

__all__ = ["BellboxLM", "TaskScore", "ZeroShot", "zero_shot"]
