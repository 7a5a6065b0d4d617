"""Write the JSON schema of a training run's YAML file: editors complete, explain and check its keys with it.

bellbox schema > bellbox.schema.json
bellbox schema --out bellbox.schema.json

Then the first line of the YAML file names it, as the YAML language server reads it:

# yaml-language-server: $schema=bellbox.schema.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bellbox.cli.output import parse_flags, write_file
from bellbox.runs.schema import config_schema


@dataclass(frozen=True)
class Schema:
    """Write the JSON schema of a training run's configuration."""

    out: Path | None = None
    """The file to write; standard output where not given."""


def main(argv: list[str]) -> None:
    """Run `bellbox schema` with the arguments after that.

    Raises:
        BellboxError: the file cannot be written.
    """
    command = parse_flags(Schema, argv, "bellbox schema", __doc__)
    text = json.dumps(config_schema(), indent=2) + "\n"
    if command.out is None:
        print(text, end="")
    else:
        write_file(command.out, text)
        print(f"written to {command.out}")
