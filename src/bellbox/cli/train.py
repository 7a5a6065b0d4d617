"""Train a model from a YAML file, from flags, or from both (flags win).

bellbox train                                               # tiny, 2 bits, the bundled books
bellbox train --folder runs/w4 --quantization.bits 4 --steps 500
bellbox train --config my.yaml --optimizer.lr 6e-4 --model.overrides num_hidden_layers=4
bellbox train --config runs/w4/config.yaml                  # go on after a kill
bellbox train --task vision --data.source cifar10.npz --model.preset resnet-small
bellbox train --import mine --quantization.method mine       # a method of your own: mine.py (docs/methods.md)
bellbox train --config configs/paper/llama-95M-2bit.yaml --dry-run     # sizes, steps, memory and time, and no run
bellbox train --config grid.yaml --row "BBQ, 2 bits"         # one row of a grid for bellbox compare
torchrun --nproc-per-node 2 -m bellbox train --distributed.mode fsdp   # two processes (docs/distributed.md)
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn

from bellbox.cli.dry_run import show_dry_run, show_dry_runs
from bellbox.cli.output import parse_flags
from bellbox.comparison.grid import Cell, Grid, is_grid, load_grid
from bellbox.convert import can_be_packed
from bellbox.errors import BellboxError, require
from bellbox.listing import summary
from bellbox.models import ResNet, ViT
from bellbox.nn import quantized_layers
from bellbox.runs.config import ModelSection
from bellbox.training import TrainConfig, Trainer, load_config
from bellbox.training.arithmetic import with_embeddings
from bellbox.training.distributed import launched_rank
from bellbox.utils.malloc import keep_freed_memory
from bellbox.utils.memory import peak_in_words
from bellbox.utils.yaml import parse_yaml


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """Train a model, low-bit or not, from a YAML file, from flags, or from both (flags win)."""

    config: str | None = None
    """YAML file with any of the keys below."""
    resume: Literal["auto", "none"] = "auto"
    """auto: go on from the last checkpoint in the folder. none: refuse a folder that has one."""
    row: str | None = None
    """Where --config is a grid for bellbox compare: the row to train, with its bits, such as "BBQ, 2 bits"."""
    dry_run: bool = False
    """Say what the run would be and take (parameters, steps, memory, time, data), and train, fetch and write nothing.
    Of a grid, without --row, each row."""
    json: str | None = None
    """With --dry-run: write the numbers to this file, - for standard output in place of the text."""


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        BellboxError: what the user can put right.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, both with a checkpoint saved.
    """
    path, row, dry = _asked_first(argv)
    grid = load_grid(path) if path is not None and is_grid(path) else None
    if grid is not None and row is None:
        _dry_run_of_rows(grid, path, argv, dry)
        return
    config, flags = _read(argv, _base(path, grid, row))
    if flags.json is not None and not flags.dry_run:
        raise BellboxError("--json is for --dry-run; a run writes metrics.jsonl into its folder")
    if grid is None:  # a row of a grid is what `compare` makes of it
        config = with_embeddings(config)
    if flags.dry_run:
        show_dry_run(config, flags.json)
        return
    _train(config, flags.resume)


def _dry_run_of_rows(grid: Grid, path: str | None, argv: list[str], dry: bool) -> None:
    """What each row of a grid would be, which no other command says.

    Raises:
        BellboxError: a run is wanted, but not which.
    """
    if not dry:
        raise BellboxError(
            f"{path}: is a grid of {len(grid.cells)} rows; train one with --row '{grid.cells[0].label}', all with "
            f"bellbox compare {path} --out FOLDER, or look at them with --dry-run"
        )
    runs = [(cell.label, *_read(argv, _of_cell(cell))) for cell in grid.cells]
    show_dry_runs(((label, config) for label, config, _ in runs), runs[0][2].json)


def _train(config: TrainConfig, resume: str) -> None:
    _refuse_folder(Path(config.folder))
    keep_freed_memory()
    if launched_rank():  # one of several processes says it
        warnings.simplefilter("ignore")
    trainer = Trainer(config, resume="auto" if resume == "auto" else None)
    imports = "".join(f" --import {name}" for name in trainer.config.methods_from)
    first, layers = (
        trainer.world.first,
        summary(trainer.model),
    )  # in all: whoever looks at a shard may ask the others
    if first:
        print(layers, flush=True)
    result = trainer.run()
    if result.stopped_by is not None:
        again = f"bellbox train --config {result.folder / 'config.yaml'}{imports}"
        if first:
            print(
                f"stopped at step {result.step} of {result.total_steps}, saved; go on with: {again}",
                flush=True,
            )
        raise SystemExit(128 + result.stopped_by)
    if first:
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
    path, row, _ = _asked_first(argv)
    grid = load_grid(path) if path is not None and is_grid(path) else None
    config, flags = _read(argv, _base(path, grid, row))
    return config, flags.resume


def _asked_first(argv: list[str]) -> tuple[str | None, str | None, bool]:
    """`--config`, `--row` and `--dry-run`, which say what the defaults of all other flags are."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    first.add_argument("--row")
    first.add_argument("--dry-run", "--dry_run", action="store_true")
    try:
        found = first.parse_known_args(argv)[0]
    except argparse.ArgumentError as error:
        raise BellboxError(
            f"{error.argument_name} needs a value after it; see bellbox train --help"
        ) from None
    return found.config, found.row, found.dry_run


def _base(path: str | None, grid: Grid | None, row: str | None) -> TrainConfig:
    """What the flags are laid over: the defaults, a file, or one row of a grid."""
    if grid is not None and row is not None:
        return _of_cell(grid.cell(row))
    if row is not None:
        raise BellboxError(f"--row {row}: is for a grid, and {path or 'no --config'} is none")
    return TrainConfig() if path is None else load_config(path)


def _of_cell(cell: Cell) -> TrainConfig:
    """A row's configuration, in a folder of its own beside the other rows."""
    config = cell.config(cell.lrs[0], cell.seeds[0])
    name = re.sub(r"[^a-z0-9.]+", "-", cell.label.lower()).strip("-")
    return dataclasses.replace(config, folder=f"{config.folder}/{name}")


def _read(argv: list[str], base: TrainConfig) -> tuple[TrainConfig, TrainFlags]:
    """The configuration that the flags make of another one, and the flags themselves."""
    tyro = require("tyro", "cli")
    default = TrainFlags(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
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
    return TrainConfig(**values), flags


def _mapping_flags(tyro: Any, base: TrainConfig) -> Any:
    """Teach tyro that a mapping is written as `key=value ...` and added to the one of the file."""
    yaml = require("yaml", "cli")
    registry = tyro.constructors.ConstructorRegistry()

    mappings = {
        dict[str, bool | int | float | str]: base.model.overrides,
        dict[str, bool | float | str]: base.quantization.options,
        dict[str, float]: base.data.mixture,
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
        [
            f"the run is in {folder}: config.yaml, metrics.jsonl, checkpoints/{peak_in_words('; ')}\nnext:",
            *commands,
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
