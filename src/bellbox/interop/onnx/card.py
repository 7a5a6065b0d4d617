"""README.md beside an ONNX file: what it is, how large, how it was checked, how it is run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bellbox.formats.packed import sizes
from bellbox.models import GPT, Llama
from bellbox.utils.files import write_text

CARD = "README.md"


def write_card(folder: Path, file: str, model: nn.Module, *, custom_op: bool, checked: str | None) -> None:
    """Write the card of `folder/file`, every number counted from what is there.

    Args:
        folder: holds the file, and `file` + ".data" where it is large.
        file: its name.
        model: packed, that it was made of.
        custom_op: whether a session needs the library of native/onnx.
        checked: the outcome of running it beside the packed model, in words; None where that was left out.
    """
    found, whole = sizes(model), sum(each.stat().st_size for each in folder.glob(f"{file}*"))
    options = (
        'options = onnxruntime.SessionOptions()\noptions.register_custom_ops_library("libbellbox_onnx.so")\n'
        if custom_op
        else ""
    )
    given = ", options" if custom_op else ""
    needs = "and a library of Bellbox (`make onnx`)" if custom_op else "alone; no code of Bellbox is needed"
    language = isinstance(model, Llama | GPT)
    text = (
        "It is a language model, its KV cache inputs and outputs: `examples/onnx_generate.py` of Bellbox writes text\n"
        "with onnxruntime and `tokenizers`. Perplexity was not measured for this card.\n"
        if language
        else "It is a vision model: images in [0, 1] to logits. Accuracy was not measured for this card.\n"
    )
    proof = f"```\n{checked}\n```" if checked else "It was not run beside the packed model (`--no-check`)."
    write_text(
        folder / CARD,
        f"""# A low-bit model for onnxruntime

`{file}` computes the packed model, inputs coded and integers multiplied as in training. It runs in onnxruntime {needs}.

```python
import onnxruntime

{options}session = onnxruntime.InferenceSession("{file}"{given})
```

{text}
| size | |
|---|---|
| parameters | {found.parameters:,}, of them {found.quantized_parameters:,} in low-bit layers |
| the file | {whole:,} bytes, {8 * whole / found.parameters:.2f} bits a parameter |
| the same parameters in bf16 | {2 * found.parameters:,} bytes |
| the packed folder of Bellbox | {found.packed_bytes + found.other_bytes:,} bytes, without headers |

## Checked

{proof}
""",
    )
