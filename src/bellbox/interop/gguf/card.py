"""The card of a GGUF file, beside it: what the file is, an honest count of its bytes, how it is read.

It is `FILE.md` and no README.md: the file may stand in anybody's folder. Every number is counted from what was written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from bellbox.interop.gguf.export import GGUFFile, WrittenTensor
from bellbox.utils.files import write_text
from bellbox.version import __version__


def card_path(file: Path) -> Path:
    """Where the card of a file stands."""
    return file.with_name(f"{file.name}.md")


def write_card(made: GGUFFile) -> Path:
    """Write the card of a file that `export_gguf` wrote; an earlier one is replaced.

    Returns:
        Where it stands.
    """
    path = card_path(made.path)
    write_text(path, card(made))
    return path


def card(made: GGUFFile) -> str:
    """The text; see `write_card`."""
    low_bit = [tensor for tensor in made.tensors if tensor.of_integers]
    parts: dict[tuple[str, str], list[WrittenTensor]] = {}
    for tensor in made.tensors:
        what = (
            "integers" if tensor.of_integers else "as they are" if tensor.type == "F32" else "rounded floats"
        )
        parts.setdefault((tensor.type, what), []).append(tensor)
    rows = [
        f"| {kind}, {what} | {_weights(some):,} | {_bytes(some):,} |"
        for (kind, what), some in sorted(parts.items())
    ]
    rest = made.bytes - _bytes(made.tensors)
    parameters = _weights(made.tensors)
    bits = f"{8 * _bytes(low_bit) / _weights(low_bit):.3f}" if low_bit else "none"
    small = f", {made.small_scales:,} very small ones to 6e-8 only" if made.small_scales else ""
    scales = (
        f"Scales are rounded to fp16, by at most {made.scale_change:.2g} of themselves{small}."
        if low_bit
        else ""
    )
    tokenizer = (
        "is in it" if made.vocabulary else f"is not in it ({made.remark}): programs take token ids only"
    )
    return f"""# {made.path.name}

{made.description}

Architecture `{made.architecture}`. The tokenizer {tokenizer}. {scales}

## How it is read

```
llama-cli -m {made.path.name} -p "..."
```

```python
AutoModelForCausalLM.from_pretrained("this-folder", gguf_file="{made.path.name}")   # transformers: weights in floats
```

Types that a program does not know are named below; `bellbox export gguf --avoid TYPE` takes a wider one. The trained
function, activations included, runs from the packed folder: `bellbox generate`, or transformers with Bellbox.

## Size

| part | weights | bytes |
|---|---|---|
{chr(10).join(rows)}
| header, metadata, tokenizer, padding | 0 | {rest:,} |
| **all of it** | {parameters:,} | {made.bytes:,} |

| true bits a weight, everything counted | |
|---|---|
| tensors of integers, with scales | {bits} |
| whole file | {8 * made.bytes / max(parameters, 1):.3f} |
| the same weights in bf16 | 16 |
{_entropies(low_bit)}
## Quality

Perplexity was not measured for this card. `bellbox eval MODEL` measures the trained function; llama.cpp's
`llama-perplexity -m {made.path.name}` measures this file.

Written by Bellbox {__version__}.
"""


def _weights(tensors: Iterable[WrittenTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _bytes(tensors: Iterable[WrittenTensor]) -> int:
    return sum(tensor.bytes for tensor in tensors)


def _entropies(low_bit: list[WrittenTensor]) -> str:
    """Rows of the table: mean entropy of the codes by the number of levels, each weight counted once."""
    rows = ""
    for levels in sorted({tensor.levels for tensor in low_bit if tensor.levels is not None}):
        some = [tensor for tensor in low_bit if tensor.levels == levels]
        known = [(tensor.entropy, math.prod(tensor.shape)) for tensor in some if tensor.entropy is not None]
        said = "not counted (a large model)"
        if len(known) == len(some):
            mean = sum(bits * count for bits, count in known) / sum(count for _, count in known)
            said = f"{mean:.3f} of {math.log2(levels):.3f} bits a weight that its codes could carry"
        rows += f"| entropy of codes of {levels} levels | {said} |\n"
    return rows
