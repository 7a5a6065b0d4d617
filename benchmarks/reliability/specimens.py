"""The formats that Bellbox reads: a good file or folder of each, its real reader, and what vouches for its content."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import bellbox as bb
from bellbox.comparison import load_grid, summarise, tables
from bellbox.comparison.results import Result, Results
from bellbox.comparison.selection import kept
from bellbox.data.images import open_images
from bellbox.data.prepare import prepare
from bellbox.data.shards import MANIFEST, TokenDataset
from bellbox.data.sources import resolve
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.formats import binarized
from bellbox.formats.auto import open_model
from bellbox.formats.description import SECTION, seal
from bellbox.models import GPTConfig, LlamaConfig, build, load_hf, save_hf
from bellbox.ptq.driver import Job, binarize_folder
from bellbox.ptq.group import Settings
from bellbox.recipe import Recipe, recipe_from_dict
from bellbox.report.record import read_record
from bellbox.runs.checkpoint import Checkpoints, State
from bellbox.runs.config import BatchSection, DataSection, ModelSection, TrainConfig
from bellbox.runs.config_file import load_config
from bellbox.utils.files import checksum, describe_file, sha256_file
from bellbox.utils.yaml import read_yaml

VOCABULARY = 300
TEXT = "It was a dark and cold night; the sea was far away, and nobody knew the way home. "


@dataclass
class Format:
    """A kind of file or folder."""

    make: Callable[[Path], None]
    """Writes a good one into an empty folder."""
    read: Callable[[Path], Any]
    """Reads it and uses it; what it gives is compared by its repr."""
    files: tuple[str, ...]
    """What is mutated, as patterns."""
    seal: Callable[[Path], None] | None = None
    """Makes all checksums match again; None where there are none."""
    bound: tuple[str, ...] = ()
    """Files that something else vouches for, which nobody seals: read otherwise, they are another function."""
    share: float = 1.0
    """Of all mutations, beside the other formats' ones: what is slow to read gets less of them."""
    honest: int = 0
    """Bytes that reading the good one takes; measured."""
    content: str = ""
    """What reading the good one gives."""


def tiny() -> Any:
    return build(LlamaConfig(VOCABULARY, 16, 32, 1, 2, max_position_embeddings=32), seed=0)


def logits(model: torch.nn.Module) -> Any:
    with torch.no_grad():
        return model.eval()(torch.arange(6)[None] % 7).flatten()[:50].tolist()


def make_tokens(folder: Path, name: str = "") -> Path:
    source = folder / "text.txt"
    source.write_text("\n<|endoftext|>\n".join(TEXT * 3 + str(i) for i in range(40)))
    prepare([source], folder / (name or "set"), vocab_size=VOCABULARY, valid_fraction=0.2)
    source.unlink()
    return folder / (name or "set")


def make_packed(folder: Path) -> None:
    model = bb.prepare(tiny(), bb.Recipe.bbq(bits=2))
    logits(model)
    tokens = make_tokens(folder)
    bb.save(bb.convert(model), folder / "packed", tokenizer=tokens / "tokenizer.json")
    shutil.rmtree(tokens)


def read_packed(folder: Path) -> Any:
    opened = open_model(folder / "packed")
    return logits(opened.model), opened.load_tokenizer().encode(TEXT)


def seal_packed(folder: Path) -> None:
    path = folder / "packed" / "config.json"
    config = json.loads(path.read_bytes())
    section = config[SECTION]
    for name in section["files"]:
        if os.path.basename(name) == name:
            section["files"][name] = describe_file(path.parent / name)
    section["sha256"] = seal(config)
    path.write_text(json.dumps(config))


def read_tokens(folder: Path) -> Any:
    dataset = TokenDataset.open(folder / "set", verify=True)
    split = dataset.split("train")
    ids = split.read(0, min(50, len(split)))
    return ids.tolist(), dataset.byte_lengths()[:300].tolist(), dataset.tokenizer.decode(ids), len(split)


def seal_tokens(folder: Path) -> None:
    from bellbox.data.shards import Manifest, write_manifest

    path = folder / "set" / MANIFEST
    fields = json.loads(path.read_bytes())
    fields.pop("sha256")
    fields["tokenizer_sha256"] = sha256_file(path.parent / "tokenizer.json")
    for split in fields["splits"].values():
        for shard in split["shards"]:
            shard["sha256"] = sha256_file(path.parent / os.path.basename(shard["file"]))
    write_manifest(path.parent, Manifest.model_construct(**fields))


def make_npz(folder: Path) -> None:
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (12, 6, 6, 3), dtype=np.uint8), np.arange(12) % 3
    names = np.array(["red", "green", "blue"])
    arrays = {
        f"{split}_{what}": a
        for split in ("train", "test")
        for what, a in (("images", images), ("labels", labels))
    }
    np.savez(folder / "a.npz", class_name=names, **arrays)


def make_jpegs(folder: Path) -> None:
    import io

    from PIL import Image

    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split in ("train", "test"):
        pictures = []
        for _ in range(5):
            out = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "JPEG")
            pictures.append(out.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(pictures), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, pictures)])
        arrays[f"{split}_labels"] = np.arange(5) % 2
    np.savez(folder / "a.npz", **arrays)


def make_pictures(folder: Path) -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, endings in (("train", ("png", "jpg", "bmp", "webp")), ("valid", ("gif", "tif", "ppm", "png"))):
        for number, ending in enumerate(endings):
            place = folder / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(draw.integers(0, 256, (9, 7, 3), dtype=np.uint8))
            picture.save(place / f"{number}.{ending}")


def read_pictures(folder: Path) -> Any:
    dataset = open_images(str(folder), 8)
    splits = dataset.train, dataset.valid
    return [split.read(range(min(4, len(split)))).flatten().tolist() for split in splits], dataset.classes


def read_images(source: Path) -> Any:
    dataset = open_images(str(source))
    read = dataset.train.read(range(min(8, len(dataset.train))))
    return read.flatten()[:100].tolist(), dataset.classes[:10], dataset.train.shape, dataset.statistics()


def make_idx(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("train", 6), ("t10k", 4)):
        images = draw.integers(0, 256, (count, 5, 5), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 3)):
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            data = bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()
            if name == "train":
                (folder / f"{name}-{kind}-ubyte").write_bytes(data)
            else:
                (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))


def make_yaml(folder: Path) -> None:
    config = TrainConfig().to_dict()
    config["model"]["overrides"] = {"hidden_size": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def make_results(folder: Path) -> None:
    with (folder / "results.jsonl").open("w") as file:
        for row, seed in (("BBQ", 0), ("BBQ", 1), ("LSQ", 0)):
            config = {**TrainConfig().to_dict(), "seed": seed, "steps": 10}
            config["quantization"]["method"] = row.lower()
            history = [
                {"step": 10, "tokens": 100, "loss": 2.0, "weight_entropy": 1.9, "activation_entropy": 1.8}
            ]
            gamma = {"up": {"low": 0.1, "high": 0.2, "counts": [1, 2]}}
            one = Result(
                "study",
                row,
                2,
                1e-3,
                seed,
                {},
                config,
                "ab",
                None,
                10,
                100,
                2.0,
                7.0,
                history=history,
                gamma=gamma,
            )
            file.write(json.dumps(vars(one)) + "\n")
    cell = {"row": "BBQ", "bits": 2, "lrs": [1e-3], "seeds": [0, 1], "config": config, "data": "ab"}
    cell["config"]["quantization"]["method"] = "bbq"
    (folder / "grids").mkdir()
    (folder / "grids" / "study.json").write_text(json.dumps({"cells": [cell]}))


def read_results(folder: Path) -> Any:
    studies = summarise(Results(folder).all, kept(folder))
    return tables.markdown(studies), tables.latex(studies), tables.comma_separated(studies)


def make_tokenizer(folder: Path) -> None:
    shutil.copyfile(make_tokens(folder) / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "set")


def read_tokenizer(folder: Path) -> Any:
    found = Tokenizer.load(folder / "tokenizer.json")
    ids = found.encode(TEXT + "<|endoftext|> é 😀")
    return ids, found.decode(ids), found.byte_lengths()[:300].tolist(), found.end_of_text, found.vocab_size


def read_sentencepiece(folder: Path) -> Any:
    found = Tokenizer.load(folder / "tokenizer.model")
    ids = found.encode(TEXT + " é 😀")
    return ids, found.decode(ids), found.end_of_text, found.vocab_size


def make_hf(folder: Path) -> None:
    make_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    save_hf(tiny(), folder)


def read_hf(folder: Path) -> Any:
    opened = open_model(folder)
    tokenizer = opened.load_tokenizer()
    return logits(opened.model), tokenizer.encode(TEXT), Tokenizer.load(folder).end_of_text


def make_hf_shards(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_hf(build(GPTConfig(VOCABULARY, 16, 32, 1, 2, max_position_embeddings=32), seed=0), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {
        name: f"model-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(sorted(tensors))
    }
    for shard in sorted(set(places.values())):
        save_file(
            {name: tensors[name] for name in tensors if places[name] == shard},
            folder / shard,
            {"format": "pt"},
        )
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_source(folder: Path) -> None:
    """A model to binarize and its text."""
    (folder / "source").mkdir()
    make_hf(folder / "source")
    (folder / "text.txt").write_text(TEXT * 20)


def job_of(folder: Path) -> Job:
    return Job(
        folder / "source", folder / "out", folder / "text.txt", Settings("billm"), samples=4, context=16
    )


def make_binarized(folder: Path) -> None:
    make_source(folder)
    binarize_folder(job_of(folder), show=False)
    for name in ("source", "text.txt"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_binarized(folder: Path) -> Any:
    opened = open_model(folder / "out")
    record = binarized.read_record(folder / "out")
    return logits(opened.model), opened.load_tokenizer().encode(TEXT), record


def seal_binarized(folder: Path) -> None:
    path = folder / "out" / "config.json"
    config = json.loads(path.read_bytes())
    for name in config["files"]:
        config["files"][name] = describe_file(path.parent / os.path.basename(name))
    config["sha256"] = checksum(config)
    path.write_text(json.dumps(config))


def make_unfinished(folder: Path) -> None:
    """As a kill leaves it after the one block."""
    make_source(folder)
    from bellbox.ptq import driver

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    finish, driver._finish = driver._finish, killed
    try:
        binarize_folder(job_of(folder), show=False)
    except KeyboardInterrupt:
        pass
    finally:
        driver._finish = finish


def copy_as_it_is(folder: Path, to: Path) -> None:
    """Links stay links, even to /dev/zero, and pipes pipes."""

    def copy(source: str, target: str) -> object:
        return os.mkfifo(target) if Path(source).is_fifo() else shutil.copy2(source, target)

    shutil.copytree(folder, to, symlinks=True, copy_function=copy)


def read_unfinished(folder: Path) -> Any:
    """Goes on in a copy, since that changes it."""
    again = folder.with_name(folder.name + "-again")
    shutil.rmtree(again, ignore_errors=True)
    copy_as_it_is(folder, again)
    try:
        record = binarize_folder(job_of(again), show=False)
        return record["blocks"][0]["layers"], logits(binarized.load(again / "out"))
    finally:
        shutil.rmtree(again)


def make_checkpoint(folder: Path) -> None:
    state = State(step=3, tokens=30, seconds=1.0, loss=2.0, best_loss=2.0)
    Checkpoints(folder / "checkpoints").save(state, dict(tiny().state_dict()), {"a/exp_avg": torch.ones(4)})


def read_checkpoint(folder: Path) -> Any:
    found = Checkpoints(folder / "checkpoints").at(3)
    model = tiny()
    stored = found.model_tensors()
    odd = set(model.state_dict()) ^ set(stored)
    return (
        vars(found.state),
        sorted(odd),
        found.optimizer_tensors(),
        [value.sum() for value in stored.values()],
    )


def seal_checkpoint(folder: Path) -> None:
    for root in [*(folder / "checkpoints").glob("step-*"), *(folder / "run" / "checkpoints").glob("step-*")]:
        manifest = json.loads((root / "manifest.json").read_bytes())
        for name in manifest["files"]:
            manifest["files"][name] = describe_file(root / os.path.basename(name))
        (root / "manifest.json").write_text(json.dumps(manifest))


def make_run(folder: Path) -> None:
    from bellbox.training import train

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = TrainConfig(
        folder=str(folder / "run"),
        model=ModelSection(overrides=dict(sizes)),
        data=DataSection(source=str(make_tokens(folder)), context=16),
        batch=BatchSection(tokens=32, micro_sequences=2),
        steps=2,
        eval_every=1,
        checkpoint_every=1,
        log_every=1,
        precision="fp32",
        tensorboard=False,
    )
    train(config, show=False)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000001")


def make_resumed(folder: Path) -> None:
    make_run(folder)
    config = load_config(folder / "run" / "config.yaml")
    shutil.move(folder / "set", folder / "run" / "set")
    values = config.to_dict()
    values["folder"], values["data"]["source"], values["threads"] = "run", "run/set", 1
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(values))


def read_resumed(folder: Path) -> Any:
    """Goes on with a finished run, in a copy, since that writes to it."""
    from bellbox.training import Trainer

    again, before = folder.with_name(folder.name + "-again"), os.getcwd()
    shutil.rmtree(again, ignore_errors=True)
    copy_as_it_is(folder, again)
    os.chdir(again)  # what is in the folder is named from there
    try:
        # Wherever a changed configuration says that it lives, and with however many threads.
        config = dataclasses.replace(load_config("run/config.yaml"), folder="run", threads=1)
        if config.total_steps > 3:
            raise BellboxError("more steps may be asked for, and would be trained")
        trainer = Trainer(config, show=False)
        result = trainer.run()
        return result.step, result.best_loss, logits(trainer.model)
    finally:
        os.chdir(before)
        shutil.rmtree(again)


def read_run(folder: Path) -> Any:
    opened = open_model(folder / "run")
    return logits(opened.model), opened.context


def read_page(folder: Path) -> Any:
    from bellbox.report import ReportInput, render

    record = read_record(folder / "run")
    render(ReportInput(record=record, step=2, model="a model"))  # has the date in it
    return record


def make_grid(folder: Path) -> None:
    rows = {
        "full precision": {"quantization": {"method": "none"}},
        "BBQ": {"quantization": {"method": "bbq", "block": 64}, "bits": [2], "lr": [2.0e-3]},
        "two": {"quantization": {"recipe": Recipe.bbq(bits=2).to_dict()}},
    }
    base = {"model": {"preset": "tiny"}, "data": {"context": 256}, "tokens": 1_000_000}
    grid = {
        "about": "methods",
        "base": base,
        "lr": [1e-3, 2e-3],
        "seeds": [0, 1],
        "bits": [2, 4],
        "rows": rows,
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(grid)), sort_keys=False))


def make_recipe(folder: Path) -> None:
    recipe = json.loads(json.dumps(Recipe.bbq(bits=2).to_dict()))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def read_recipe(folder: Path) -> Any:
    recipe = recipe_from_dict(read_yaml(folder / "recipe.yaml"))
    return recipe, sorted(bb.prepare(tiny(), recipe).state_dict())


def make_sentencepiece(folder: Path) -> None:
    import sentencepiece

    (folder / "text").write_text("".join(f"{TEXT} {i}\n" for i in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True,
    )  # fmt: skip
    for name in ("text", "tokenizer.vocab"):
        (folder / name).unlink()


def make_documents(folder: Path) -> None:
    rows = [{"text": f"{TEXT}{i}", "id": i} for i in range(6)]
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.csv").write_text("id,text\n" + "".join(f'{i},"{TEXT}""{i}"""\n' for i in range(6)))
    (folder / "d.txt.gz").write_bytes(gzip.compress(TEXT.encode() * 5))
    (folder / "f.tsv").write_text("id\ttext\n" + "".join(f"{i}\t{TEXT}\n" for i in range(6)))
    (folder / "g.txt.xz").write_bytes(lzma.compress(TEXT.encode() * 5))
    (folder / "h.txt").write_text(f"{TEXT}\n<|endoftext|>\n{TEXT}")
    with contextlib.suppress(ImportError):
        import zstandard

        (folder / "i.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "one"}\n' * 5))
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), folder / "e.parquet")


def read_documents(folder: Path) -> Any:
    return [piece for source in resolve([folder]) for piece in source.pieces()]


FORMATS: dict[str, Format] = {
    "packed": Format(make_packed, read_packed, ("packed/*",), seal_packed, share=0.4),
    "binarized": Format(make_binarized, read_binarized, ("out/*",), seal_binarized, share=0.15),
    "unfinished": Format(
        make_unfinished,
        read_unfinished,
        ("out.unfinished/*", "source/*.json", "text.txt"),
        bound=("out.unfinished/*", "source/*.json", "text.txt"),
        share=0.01,
    ),
    "tokens": Format(lambda folder: make_tokens(folder) and None, read_tokens, ("set/*",), seal_tokens),
    "npz": Format(make_npz, lambda folder: read_images(folder / "a.npz"), ("a.npz",)),
    "jpegs": Format(make_jpegs, lambda folder: read_images(folder / "a.npz"), ("a.npz",), share=0.7),
    "idx": Format(make_idx, read_images, ("*",)),
    "pictures": Format(make_pictures, read_pictures, ("*/*/*",)),
    "yaml": Format(
        make_yaml, lambda folder: load_config(folder / "config.yaml"), ("config.yaml",), share=0.15
    ),
    "grid": Format(make_grid, lambda folder: load_grid(folder / "grid.yaml"), ("grid.yaml",), share=0.02),
    "recipe": Format(make_recipe, read_recipe, ("recipe.yaml",), share=0.15),
    "results": Format(make_results, read_results, ("results.jsonl", "grids/*")),
    "tokenizer": Format(make_tokenizer, read_tokenizer, ("tokenizer.json",)),
    "sentencepiece": Format(make_sentencepiece, read_sentencepiece, ("tokenizer.model",), share=0.4),
    "huggingface": Format(make_hf, read_hf, ("*",), share=0.2),
    "shards": Format(make_hf_shards, lambda folder: logits(load_hf(folder)), ("*",), share=0.2),
    "checkpoint": Format(make_checkpoint, read_checkpoint, ("checkpoints/*/*",), seal_checkpoint),
    "run": Format(
        make_run,
        read_run,
        ("run/config.yaml", "run/tokenizer.json", "run/checkpoints/*/*"),
        seal_checkpoint,
        bound=("run/config.yaml", "run/tokenizer.json"),
        share=0.06,
    ),
    "resumed": Format(
        make_resumed,
        read_resumed,
        ("run/*", "run/set/*", "run/checkpoints/*/*"),
        seal_checkpoint,
        bound=("run/config.yaml", "run/set/*"),
        share=0.008,
    ),
    "metrics": Format(make_run, lambda folder: read_record(folder / "run"), ("run/*.json*",), share=0.7),
    "page": Format(make_run, read_page, ("run/metrics.jsonl", "run/environment.json"), share=0.003),
    "documents": Format(make_documents, read_documents, ("*",)),
}
