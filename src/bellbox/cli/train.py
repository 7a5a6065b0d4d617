"""Train a model from a YAML file, from flags, or from both (flags win).

bellbox train                                               # tiny, 2 bits, the bundled books
bellbox train --folder runs/w4 --quantization.bits 4 --steps 500
bellbox train --config my.yaml --optimizer.lr 6e-4 --model.overrides num_hidden_layers=4
bellbox train --config runs/w4/config.yaml                  # go on after a kill
bellbox train --task vision --data.source cifar10.npz --model.preset resnet-small
bellbox train --import mine --quantization.method mine       # a method of your own: mine.py (docs/methods.md)
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn

from bellbox.cli.output import parse_flags
from bellbox.convert import can_be_packed, summary
from bellbox.errors import BellboxError, require
from bellbox.models import ResNet, ViT
from bellbox.nn import quantized_layers
from bellbox.runs.config import ModelSection
from bellbox.training import TrainConfig, Trainer, load_config
from bellbox.utils.malloc import keep_freed_memory
from bellbox.utils.yaml import parse_yaml


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """Train a model, low-bit or not, from a YAML file, from flags, or from both (flags win)."""

    config: str | None = None
    """YAML file with any of the keys below."""
    resume: Literal["auto", "none"] = "auto"
    """auto: go on from the last checkpoint in the folder. none: refuse a folder that has one."""


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        BellboxError: what the user can put right.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, both with a checkpoint saved.
    """
    config, resume = parse(argv)
    _refuse_folder(Path(config.folder))
    keep_freed_memory()
    trainer = Trainer(config, resume="auto" if resume == "auto" else None)
    imports = "".join(f" --import {name}" for name in trainer.config.methods_from)
    print(summary(trainer.model), flush=True)
    result = trainer.run()
    if result.stopped_by is not None:
        again = f"bellbox train --config {result.folder / 'config.yaml'}{imports}"
        print(
            f"stopped at step {result.step} of {result.total_steps}, saved; go on with: {again}", flush=True
        )
        raise SystemExit(128 + result.stopped_by)
    print(_farewell(result.folder, trainer.model, imports))


def _refuse_folder(folder: Path) -> None:
    """Refuse to train into a folder that is something else of ours; other people's files in it do not matter.

    Raises:
        BellboxError: it holds a model or a dataset.
    """
    other = next((name for name in ("config.json", "manifest.json") if (folder / name).exists()), None)
    if other is not None and not (folder / "config.yaml").exists():
        raise BellboxError(
            f"{folder}: holds a model or a dataset ({other}), not a run; name another --folder"
        )


def parse(argv: list[str]) -> tuple[TrainConfig, str]:
    """The configuration that a command line describes, and its `--resume`.

    Raises:
        BellboxError: an unreadable file, a flag that does not exist or is repeated, a value out of range.
        SystemExit: 0 for --help.
    """
    tyro = require("tyro", "cli")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    try:
        path = first.parse_known_args(argv)[0].config
    except SystemExit:
        raise BellboxError("--config needs a YAML file after it") from None
    base = TrainConfig() if path is None else load_config(path)
    default = TrainFlags(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)}, config=path)
    model = base.model
    from_flag = tyro.conf.arg(
        name="from", help="Begin with the weights of this folder (a Hugging Face model or a run)."
    )
    named = dataclasses.make_dataclass(
        "ModelSection",
        [("pretrained", Annotated[str | None, from_flag], None)],
        bases=(ModelSection,),
        frozen=True,
        namespace={"__doc__": ModelSection.__doc__},
    )
    default = dataclasses.replace(default, model=named(model.preset, model.overrides, model.pretrained))
    kind = dataclasses.make_dataclass(
        "TrainFlags",
        [
            ("model", named, dataclasses.field(default_factory=named)),
            # Written by a run, and no wish of anybody's.
            (
                "methods_from",
                Annotated[list[str], tyro.conf.Suppress],
                dataclasses.field(default_factory=list),
            ),
        ],
        bases=(TrainFlags,),
        frozen=True,
        namespace={"__doc__": TrainFlags.__doc__},
    )
    registry = _mapping_flags(tyro, base)
    flags = parse_flags(kind, argv, "bellbox train", __doc__, default=default, registry=registry)
    values = {f.name: getattr(flags, f.name) for f in dataclasses.fields(TrainConfig)}
    chosen = flags.model
    values["model"] = ModelSection(chosen.preset, chosen.overrides, chosen.pretrained)
    return TrainConfig(**values), flags.resume


def _mapping_flags(tyro: Any, base: TrainConfig) -> Any:
    """Teach tyro that a mapping is written as `key=value ...` and added to the one of the file."""
    yaml = require("yaml", "cli")
    registry = tyro.constructors.ConstructorRegistry()

    mappings = {
        dict[str, bool | int | float | str]: base.model.overrides,
        dict[str, bool | float | str]: base.quantization.options,
    }

    def read(words: list[str], before: dict[str, Any]) -> dict[str, Any]:
        pairs = [word.partition("=") for word in words]
        seen: set[str] = set()
        for key, equals, _ in pairs:
            if not equals or not key:
                raise ValueError(f"'{key}' must be written KEY=VALUE")
            if key in seen:
                raise ValueError(f"'{key}' is given twice; leave one of them out")
            seen.add(key)
        return {**before, **{key: parse_yaml(value, key) for key, _, value in pairs}}

    @registry.primitive_rule
    def mapping(info: Any) -> Any:
        before = next((value for kind, value in mappings.items() if info.type == kind), None)
        if before is None:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="KEY=VALUE",
            instance_from_str=lambda words: read(words, before),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [f"{key}={entry}" for key, entry in value.items()],
        )

    @registry.primitive_rule
    def recipe(info: Any) -> Any:
        if info.type not in (dict[str, Any] | None, dict[str, Any]):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="YAML",
            instance_from_str=lambda words: parse_yaml(words[0], "recipe"),
            is_instance=lambda value: value is None or isinstance(value, dict),
            str_from_instance=lambda value: [yaml.safe_dump(value, default_flow_style=True).split("\n")[0]],
        )

    return registry


def _farewell(folder: Path, model: nn.Module, imports: str = "") -> str:
    commands = [f"bellbox eval {folder}{imports}", f"bellbox report {folder}{imports}"]
    layers = [layer for _, layer in quantized_layers(model)]
    inputs = [layer.activation_quantizer.quantizer for layer in layers if layer.activation_quantizer]
    if all(
        quantizer.granularity != "tensor" for quantizer in inputs
    ):  # else: to train with and measure, no more
        if layers and all(map(can_be_packed, layers)):
            commands.append(f"bellbox convert {folder} --out {folder}-packed{imports}")
        if not isinstance(model, ResNet | ViT):
            commands.append(f'bellbox generate {folder}{imports} --prompt "Once upon a time"')
    return "\n  ".join(
        [f"the run is in {folder}: config.yaml, metrics.jsonl, checkpoints/\nnext:", *commands]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
