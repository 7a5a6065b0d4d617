"""Reading YAML: nothing but plain values, and no key twice.

YAML readers keep the last of two equal keys and drop the first without a word: a second `lr:` further down, or a
second row of the same name, would never be missed. Merge keys (`<<`) may be overridden, as ever.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from bellbox.errors import BellboxError, require


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a file.

    Raises:
        BellboxError: it cannot be read, or `parse_yaml` refuses it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BellboxError(f"cannot read '{path}': {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The content of a text.

    Args:
        text: YAML.
        where: it stands, for messages.

    Raises:
        BellboxError: no YAML, or a key twice in one mapping; `1` and `'1'` are the same key.
    """
    yaml = require("yaml", "cli")
    try:
        return yaml.load(text, _loader())  # a SafeLoader
    except yaml.YAMLError as error:
        raise BellboxError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except BellboxError as error:
        raise BellboxError(f"{where}: {error}") from None


_MERGE = "tag:yaml.org,2002:merge"


@functools.cache
def _loader() -> type:
    yaml = require("yaml", "cli")

    class Strict(yaml.SafeLoader):
        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self._checked: set[int] = set()

        def flatten_mapping(self, node: Any) -> None:
            # Called before a mapping is made, and before it is merged into another: the first time it is as written.
            if id(node) not in self._checked:
                self._checked.add(id(node))
                self._refuse_repeated_keys(node)
            super().flatten_mapping(node)

        def _refuse_repeated_keys(self, node: Any) -> None:
            seen: set[object] = set()
            for key_node, _ in node.value:
                if isinstance(key_node, yaml.ScalarNode):
                    key = self.construct_object(key_node) if key_node.tag != _MERGE else "<<"
                    if {key, str(key)} & seen:
                        line = key_node.start_mark.line + 1
                        raise BellboxError(
                            f"line {line}: key '{key}' stands twice in one mapping; leave one of them out"
                        )
                    seen |= {key, str(key)}

    return Strict
