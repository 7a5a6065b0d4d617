"""The model card of a folder for transformers: what it needs, an honest count of its bytes, how to load it.

Every number is counted from the files and tensors that are there. What was not measured is said to be so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bellbox.core.entropy import ENTROPY_LIMIT, code_counts, entropy_bits
from bellbox.formats.description import CONFIG, TENSORS
from bellbox.formats.schema import stored_buffers
from bellbox.nn import CodedLayer
from bellbox.utils.files import write_text
from bellbox.version import __version__

CARD = "README.md"


def write_card(
    root: Path,
    layers: Mapping[str, CodedLayer],
    tensors: Mapping[str, Tensor],
    classes: Mapping[str, str],
    tables: Mapping[str, int] | None = None,
) -> None:
    """Write README.md into a folder whose `config.json` and `model.safetensors` are written.

    Args:
        root: the folder.
        layers: packed, by name.
        tensors: all of the file.
        classes: the Auto classes that load it, and the classes that they give.
        tables: weights of embeddings and heads that are stored rounded, by name of the module.
    """
    write_text(root / CARD, card(root, layers, tensors, classes, tables or {}))


def card(
    root: Path,
    layers: Mapping[str, CodedLayer],
    tensors: Mapping[str, Tensor],
    classes: Mapping[str, str],
    tables: Mapping[str, int],
) -> str:
    """The text; see `write_card`."""
    auto = next((a for a in ("AutoModelForCausalLM", *classes) if a in classes), "AutoModel")
    rows, low_bit, weights, parameters = _parts(layers, tensors, tables)
    on_disk = {name: (root / name).stat().st_size for name in (TENSORS, CONFIG)}
    header = on_disk[TENSORS] - sum(t.nbytes for t in tensors.values())
    rows += [("header of the file and config.json", 0, header + on_disk[CONFIG])]
    whole = sum(on_disk.values())
    table = "\n".join(f"| {what} | {count:,} | {size:,} |" for what, count, size in rows)
    entropy = _entropy(layers) if weights <= ENTROPY_LIMIT else None
    said = (
        "not counted (a large model)"
        if entropy is None
        else f"{entropy[0]:.3f} of {entropy[1]:.3f} bits a weight that its codes could carry"
    )
    kinds = ", ".join(f"{count} {what}" for what, count in sorted(_kinds(layers).items()))
    return f"""---
library_name: transformers
tags:
- bellbox
- quantized
---

# A low-bit model that needs Bellbox

**Without [Bellbox](https://pypi.org/project/bellbox/) this folder does not load.** Its layers are integers that
transformers alone does not know. `config.json` therefore names a file of weights that is not there, so that loading
without Bellbox is an error instead of a model with random weights.

```bash
pip install "bellbox[transformers]"
```

```python
import bellbox.interop.transformers  # tells transformers how these layers are read
from transformers import {auto}

model = {auto}.from_pretrained("this-folder")
```

With `trust_remote_code=True` the import is not needed: `modeling_bellbox.py` does it.
{_other_ways(root)}
## Size

| part | parameters | bytes |
|---|---|---|
{table}
| **all of it** | {parameters:,} | {whole:,} |

| true bits a parameter, everything counted | |
|---|---|
| low-bit layers, with scales and activation constants | {8 * low_bit / max(weights, 1):.3f} |
| whole model, on disk | {8 * whole / max(parameters, 1):.3f} |
| the same parameters in bf16 | 16 |
| entropy of the weights' codes | {said} |

Low-bit layers: {kinds}. Everything else is as it was trained, or rounded where the table says so.

## Quality

Perplexity and accuracy were not measured for this card. `bellbox eval FOLDER --data TEXT` measures perplexity of
the models that Bellbox builds itself.

Written by Bellbox {__version__}.
"""


def _other_ways(root: Path) -> str:
    from bellbox.formats.packed import read_config

    if read_config(root)["model"] is None:
        return """
Without transformers' loader: `bellbox.load("this-folder", into=model)` fills a model of the same class.
"""
    return """
Without transformers: `bellbox generate this-folder --prompt "..."`, or `bellbox.load("this-folder")` in Python.
"""


def _parts(
    layers: Mapping[str, CodedLayer], tensors: Mapping[str, Tensor], tables: Mapping[str, int]
) -> tuple[list[tuple[str, int, int]], int, int, int]:
    """Rows of the table, bytes of the low-bit layers, their weights, and all parameters."""
    inside = {
        f"{name}.{key}" if name else key: key
        for name, layer in layers.items()
        for key in stored_buffers(layer)
    }
    codes = sum(tensors[name].nbytes for name, key in inside.items() if key == "weight_packed")
    biases = {name for name, key in inside.items() if key == "bias"}
    constants = sum(tensors[name].nbytes for name in inside if name not in biases) - codes
    rounded = {name for name in tensors if name.rpartition(".")[0] in tables and not name.endswith(".bias")}
    rest = [tensors[name] for name in tensors if name not in inside and name not in rounded]
    rest += [tensors[name] for name in biases]
    weights = sum(layer.row_length * layer.row_count for layer in layers.values())
    rows = [
        ("codes of low-bit layers", weights, codes),
        ("their scales and activation constants", 0, constants),
    ]
    if rounded:
        rows.append(
            ("embeddings and head, rounded", sum(tables.values()), sum(tensors[n].nbytes for n in rounded))
        )
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in rest:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for dtype, some in by_dtype.items():
        name = str(dtype).removeprefix("torch.")
        rows.append((f"the rest in {name}", sum(t.numel() for t in some), sum(t.nbytes for t in some)))
    return rows, codes + constants, weights, sum(count for _, count, _ in rows)


def _entropy(layers: Mapping[str, CodedLayer]) -> tuple[float, float]:
    """Mean entropy of the codes of a weight, and the most that it could be; each weight counts once."""
    total, sum_of, most = 0, 0.0, 0.0
    for layer in layers.values():
        count = layer.row_length * layer.row_count
        sum_of += count * entropy_bits(code_counts(layer.weight_codes(), layer.weight_levels.n))
        most += count * layer.weight_levels.bits
        total += count
    return sum_of / total, most / total


def _kinds(layers: Mapping[str, CodedLayer]) -> Counter[str]:
    found: Counter[str] = Counter()
    for layer in layers.values():
        method = f" ({layer.quantization_method})" if layer.quantization_method else ""
        inputs = getattr(layer, "coding", None)
        beside = "float inputs" if inputs is None else f"inputs of {inputs.levels.n} levels"
        found[f"with weights of {layer.weight_levels.n} levels and {beside}{method}"] += 1
    return found
