"""The JSON schema of a training run's YAML file, from which editors complete, explain and check its keys.

What is said of a key is the text under its field in `bellbox.runs.config`; its limits are the field's own. What depends
on several keys at once, a schema does not say: `TrainConfig.check` does.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from typing import Any

from bellbox.runs import config
from bellbox.runs.config import TrainConfig


def config_schema() -> dict[str, Any]:
    """The schema, JSON Schema 2020-12, as nested dicts."""
    from pydantic import TypeAdapter

    schema: dict[str, Any] = TypeAdapter(TrainConfig).json_schema()
    sections: dict[str, dict[str, Any]] = {**schema["$defs"], "TrainConfig": schema}
    texts = _texts(inspect.getsource(config))
    for name, section in sections.items():
        for key, described in section["properties"].items():
            described.pop("title", None)  # the key once more, in capitals
            if key in texts[name]:
                described["description"] = texts[name][key]
    model = sections["ModelSection"]["properties"]
    model["from"] = model.pop("pretrained")  # a word that no field of Python may have
    schema["properties"]["base"] = {
        "type": "string",
        "description": "A YAML file, from the folder that this one lies in, over which this one is laid.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _texts(source: str) -> dict[str, dict[str, str]]:
    """Of each class in a module's source, what stands under its fields, by name, in one line each."""
    found: dict[str, dict[str, str]] = {}
    for section in ast.parse(source).body:
        if not isinstance(section, ast.ClassDef):
            continue
        texts = found.setdefault(section.name, {})
        for field, below in itertools.pairwise(section.body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = " ".join(str(below.value.value).split())
    return found
