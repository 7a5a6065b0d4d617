"""Packed and prepared models in transformers: `from_pretrained`, `generate`, `save_pretrained`.

Importing this registers how transformers reads a folder whose `quantization_config` says `bellbox`. Without it, or
where Bellbox is not installed, such a folder does not load: its `config.json` names a file of weights that does not
exist, and that file's name says what is missing.

```python
import bellbox.interop.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model-2bit")                    # packed: bb.save, bellbox export hf
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=BellboxConfig(bits=2))   # to be trained
```
"""

from __future__ import annotations

from bellbox.errors import require

require("transformers", "transformers")

from bellbox.interop.transformers.config import BellboxConfig  # noqa: E402  (named before: its absence is one line)
from bellbox.interop.transformers.folder import save_transformers  # noqa: E402
from bellbox.interop.transformers.quantizer import BellboxHfQuantizer, register  # noqa: E402

register()

__all__ = ["BellboxConfig", "BellboxHfQuantizer", "save_transformers"]
