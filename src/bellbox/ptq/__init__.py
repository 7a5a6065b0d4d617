"""Post-training binarization: DBellQuant (arXiv 2507.01027) on BiLLM (arXiv 2402.04291), for trained language models.

```python
from pathlib import Path

from bellbox.ptq import Job, Settings, binarize_folder, load

job = Job(Path("some-hf-folder"), Path("one-bit"), Path("text.txt"), Settings(method="dbellquant"))
binarize_folder(job)
model = load("one-bit")
```

How it works, what it costs and what it gives: docs/ptq.md.
"""

from bellbox.formats.binarized import (
    StoredSize,
    is_binarized,
    load,
    read_record,
    set_activation_bits,
    stored_size,
    tokenizer_path,
)
from bellbox.nn.binarized_linear import BinarizedLinear
from bellbox.ptq.driver import Job, binarize_folder
from bellbox.ptq.group import Settings

__all__ = [
    "BinarizedLinear",
    "Job",
    "Settings",
    "StoredSize",
    "binarize_folder",
    "is_binarized",
    "load",
    "read_record",
    "set_activation_bits",
    "stored_size",
    "tokenizer_path",
]
