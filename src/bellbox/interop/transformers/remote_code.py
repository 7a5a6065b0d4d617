"""How a folder fails where Bellbox is not: loudly, in every way that there is.

transformers skips a quantization method that it does not know, with a warning, and fills the layers with random
weights. So `config.json` names a file of weights that does not exist (`transformers_weights`), and the name of that
file is the message; our quantizer takes the entry away before it is looked for. Beside the weights lies a module for
`trust_remote_code`, which imports Bellbox: with it nobody has to remember the import.
"""

from __future__ import annotations

import re
from typing import Any

from bellbox.formats.description import NO_SUCH_FILE, WEIGHTS_FILE

MODULE = "modeling_bellbox"


def forget_missing_file(config: Any) -> Any:
    """A transformers configuration without the file that is not there."""
    if getattr(config, WEIGHTS_FILE, None) == NO_SUCH_FILE:
        delattr(config, WEIGHTS_FILE)
    return config


def modeling_text(classes: list[str]) -> str:
    """The module that lies in a folder: the classes of transformers, once Bellbox is imported.

    Args:
        classes: names of classes of transformers.
    """
    lines = [
        '"""transformers imports this with trust_remote_code=True. It needs Bellbox: pip install bellbox."""',
        "",
        "import bellbox.interop.transformers",
        "import transformers",
        "",
        "bellbox.interop.transformers.register()",
    ]
    for name in classes:
        assert re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)
        lines += ["", "", f"class {name}(transformers.{name}):", f'    """As in transformers: {name}."""']
    return "\n".join(lines) + "\n"


def auto_classes_of(model: Any) -> dict[str, str]:
    """The Auto classes of a model and its body: `{"AutoModelForCausalLM": "LlamaForCausalLM", ...}`."""
    body = getattr(model, model.base_model_prefix or "", None)
    return auto_classes(
        model.config.model_type, {type(each).__name__ for each in (model, body) if each is not None}
    )


def auto_classes(model_type: str, wanted: set[str]) -> dict[str, str]:
    """The Auto classes that give classes of transformers for a `model_type`."""
    import transformers
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for auto, each in vars(modeling_auto).items():
        mapping = getattr(each, "_model_mapping", None) if isinstance(each, type) else None
        by_kind: Any = getattr(mapping, "_model_mapping", {})
        if model_type not in by_kind:  # `get` of transformers' mapping wants two arguments
            continue
        names = by_kind[model_type]
        for name in (names,) if isinstance(names, str) else names:
            if name in wanted and hasattr(transformers, name) and hasattr(transformers, auto):
                found[auto] = name
    return found
