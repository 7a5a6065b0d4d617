"""Bellbox: neural networks whose weights and activations are 1- to 4-bit integers.

```python
import bellbox as bb

model = bb.prepare(model, bb.Recipe.bbq(bits=2))   # train it as usual
bb.save(bb.convert(model), "model-2bit")           # safetensors + config.json
model = bb.load("model-2bit")                      # the same function, on integers
```
"""

import importlib
from types import ModuleType

from bellbox.calibrate import calibrate
from bellbox.convert import convert, prepare
from bellbox.errors import BellboxError
from bellbox.formats.packed import load, save
from bellbox.inference.folding import fold_batch_norms
from bellbox.inference.fusing import fuse_convolutions
from bellbox.listing import summary
from bellbox.nn.backend_report import backend_report
from bellbox.nn.vocabulary import grow_embeddings
from bellbox.nn.widths import set_bits
from bellbox.recipe import QuantizerSpec, Recipe, Rule
from bellbox.version import __version__

__all__ = [
    "BellboxError",
    "QuantizerSpec",
    "Recipe",
    "Rule",
    "__version__",
    "backend_report",
    "calibrate",
    "convert",
    "fold_batch_norms",
    "fuse_convolutions",
    "grow_embeddings",
    "load",
    "prepare",
    "save",
    "set_bits",
    "summary",
]

_ON_DEMAND = ("interop", "optim")
"""Parts that are imported where they are asked for."""


def __getattr__(name: str) -> ModuleType:
    if name in _ON_DEMAND:
        return importlib.import_module(f"bellbox.{name}")
    raise AttributeError(f"module 'bellbox' has no attribute {name!r}")
