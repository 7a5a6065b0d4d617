"""Bellbox: neural networks whose weights and activations are 1- to 4-bit integers.

```python
import bellbox as bb

model = bb.prepare(model, bb.Recipe.bbq(bits=2))   # train it as usual
bb.save(bb.convert(model), "model-2bit")           # safetensors + config.json
model = bb.load("model-2bit")                      # the same function, on integers
```
"""

from bellbox.errors import BellboxError
from bellbox.folding import fold_batch_norms
from bellbox.fusing import fuse_convolutions
from bellbox.io import load, save
from bellbox.recipe import QuantizerSpec, Recipe, Rule
from bellbox.surgery import convert, prepare, summary

__all__ = [
    "BellboxError",
    "QuantizerSpec",
    "Recipe",
    "Rule",
    "convert",
    "fold_batch_norms",
    "fuse_convolutions",
    "load",
    "prepare",
    "save",
    "summary",
]

__version__ = "0.1.0"
