"""Checkpoints of transformers' Trainer (and of TRL's) from which a prepared model goes on to the same bits.

The Trainer keeps what `save_pretrained` writes: of a model that `bellbox.prepare` changed, the plain weights, so that
`from_pretrained` reads them. They do not carry the learned scales, nor the exact bits of weights that are learned
rotated. A checkpoint of this class has these beside them, in a file of their own.

```python
class Trainer(bb.interop.ExactCheckpoints, transformers.Trainer):      # or trl.SFTTrainer
    pass
```

Models that are no `PreTrainedModel`, or whose `save_pretrained` keeps the quantizers itself, need no such file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from bellbox.errors import BellboxError
from bellbox.nn.pretrained import saved_as_plain
from bellbox.nn.tools import unique_tensors
from bellbox.utils.files import read_tensors, write_tensors

FILE = "bellbox_state.safetensors"
"""What is not in the other files under the name that it is loaded by: quantizers, their records, rotated weights."""


class ExactCheckpoints:
    """To be put before a Trainer class; `Trainer.train(resume_from_checkpoint=...)` is then exact."""

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._prepared()
        if model is not None:
            model.hf_quantizer.has_said = True  # what it would warn of is kept here
        super()._save(output_dir, state_dict)  # pyright: ignore[reportAttributeAccessIssue]
        if model is not None and self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            written = _names_in(folder)
            own = {name: value for name, value in unique_tensors(model).items() if name not in written}
            write_tensors(folder / FILE, {name: value.contiguous() for name, value in own.items()})

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._prepared() is not None:
            _file_of(resume_from_checkpoint)  # before anything is loaded
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore[reportAttributeAccessIssue]
        self._load_exactly(resume_from_checkpoint)

    def _load_best_model(self: Any) -> None:
        super()._load_best_model()  # pyright: ignore[reportAttributeAccessIssue]
        self._load_exactly(self.state.best_model_checkpoint)

    def _load_exactly(self: Any, folder: str) -> None:
        model = self._prepared()
        if model is None:
            return
        path = _file_of(folder)
        found = model.load_state_dict(read_tensors(path), strict=False)
        own = unique_tensors(model).keys() - _names_in(path.parent)
        wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if name in own)]
        if wrong:
            raise BellboxError(f"{path} is of another model: {wrong[0]} is in one of them alone")

    def _prepared(self: Any) -> nn.Module | None:
        """The model, where `save_pretrained` would write its plain weights."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if saved_as_plain(model) else None


def _names_in(folder: Path) -> set[str]:
    """Names of the tensors that `save_pretrained` wrote; some models are stored under others than they have."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        if path.name != FILE:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
    return names


def _file_of(folder: str) -> Path:
    path = Path(folder) / FILE
    if not path.is_file():
        raise BellboxError(
            f"{folder} has no {FILE}: it was saved by a Trainer without ExactCheckpoints, and learned scales are not "
            "in it; begin from its weights with from_pretrained and prepare instead of resuming"
        )
    return path
