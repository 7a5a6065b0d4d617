"""Reading YAML: nothing but plain values, no key twice, and no more of them than stand there.

YAML readers keep the last of two equal keys and drop the first without a word: a second `lr:` further down, or a
second row of the same name, would never be missed. Merge keys (`<<`) may be overridden, as ever. And ten lines of
references to references stand for a billion values: they are counted before anything is made of them.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from bellbox.errors import BellboxError, require
from bellbox.utils.files import one_line, read_text

_MOST_BYTES = 1 << 20
_MOST_VALUES, _MOST_LEVELS = 100_000, 64


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a file.

    Raises:
        BellboxError: it cannot be read, or `parse_yaml` refuses it.
    """
    return parse_yaml(read_text(path, _MOST_BYTES), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The content of a text.

    Args:
        text: YAML.
        where: it stands, for messages.

    Raises:
        BellboxError: no YAML; a key twice in one mapping (`1` and `'1'` are the same key); more than 100,000 values or
            64 levels of them, references followed, or one inside itself.
    """
    try:
        loader = _loader()(text)  # a SafeLoader
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except BellboxError as error:
        raise BellboxError(f"{where}: {error}") from None
    except Exception as error:
        # Beside its own errors the parser raises what its conversions do: of dates, numbers, nesting too deep.
        raise BellboxError(f"{where}: not YAML: {one_line(error)}") from None


def _count(node: Any, known: dict[int, int | None], depth: int) -> int:
    """Values that a node stands for, those of references counted each time.

    Args:
        node: of the parsed, not yet converted text.
        known: counts by identity; None while a node's own is under way.
        depth: of the node.
    """
    if depth > _MOST_LEVELS:
        raise BellboxError(f"more than {_MOST_LEVELS} levels inside each other")
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise BellboxError(f"line {node.start_mark.line + 1}: a value that stands inside itself")
        return found
    known[id(node)] = None
    inside = node.value if isinstance(node.value, list) else []
    parts = [part for one in inside for part in (one if isinstance(one, tuple) else (one,))]
    count = 1 + sum(_count(part, known, depth + 1) for part in parts)
    if count > _MOST_VALUES:
        raise BellboxError(f"more than {_MOST_VALUES:,} values, references followed")
    known[id(node)] = count
    return count


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
