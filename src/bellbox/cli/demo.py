"""The main job end to end, on text that comes with the package: train at 2 bits, evaluate, pack, prove, write, report.

bellbox demo
bellbox demo --out demo --minutes 10
bellbox demo --steps 20 --no-bars        # only to see that everything runs
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F

from bellbox import data
from bellbox.cli.convert import check_batches, describe, pack, show_sizes
from bellbox.cli.eval import Evaluation, evaluate, show
from bellbox.cli.generate import continue_text, speed_of
from bellbox.cli.output import parse_flags, write_file
from bellbox.cli.report import collect
from bellbox.errors import BellboxError, require
from bellbox.evaluation.codes import Agreement, agreement
from bellbox.formats import packed as io
from bellbox.formats.auto import open_model
from bellbox.formats.packed import Sizes
from bellbox.listing import summary
from bellbox.report import Sample, render
from bellbox.runs.build import make_model
from bellbox.runs.config import (
    BatchSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    QuantizationSection,
)
from bellbox.runs.resolve import resolve
from bellbox.training import TrainConfig, Trainer
from bellbox.training.arithmetic import EMBEDDING_BITS
from bellbox.utils.files import lock, read_json
from bellbox.utils.malloc import keep_freed_memory
from bellbox.utils.processor import Precision, choose_precision

require("tyro", "cli")


STEPS = 450
MARKER, RUN, PACKED, REPORT = "demo.json", "run", "packed", "report.html"
PROMPT = "It was"

LEAST_ENTROPY = 1.95
MOST_OF_UNIGRAM = 0.85
LEAST_RATIO = 7.5


@dataclass(frozen=True)
class Demo:
    """The main job end to end on bundled text: train at 2 bits, evaluate, pack, prove, write, report."""

    out: Path = Path("demo")
    """The folder for everything; an earlier demo there is replaced, any other folder refused."""
    steps: int | None = None
    """Optimizer steps; 450 where not given: two to four minutes on two cores."""
    minutes: float | None = None
    """In place of --steps: train for about so long, by the speed measured at the start."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the training forward; auto takes bf16 where this processor has units for it."""
    bars: bool = True
    """Exit with 1 where the result is not what the method promises."""


@dataclass(frozen=True)
class Bar:
    """One thing that the demo must reach."""

    what: str
    reached: bool


def main(argv: list[str]) -> None:
    """Run `bellbox demo` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
        SystemExit: 1 where a bar is missed, 130 or 143 after a signal.
    """
    command = parse_flags(Demo, argv, "bellbox demo", __doc__)
    _check_length(command)
    begun = time.monotonic()
    handle = _claim(command.out)
    keep_freed_memory()
    try:
        precision, why = choose_precision(torch.device("cpu"))
        if command.precision != "auto":
            precision, why = command.precision, "as asked"
        seconds = _seconds_per_step(precision)
        steps = command.steps or STEPS
        if command.minutes is not None:
            steps = max(1, round(60 * command.minutes / seconds))
        print(
            f"precision {precision}: {why}; {seconds:.2f} s a step, {steps:,} steps take about "
            f"{_clock(seconds * steps)}"
        )
        bars = run_demo(command.out, steps, precision, begun)
    finally:
        handle.close()
    missed = [bar.what for bar in bars if not bar.reached]
    _farewell(command.out, time.monotonic() - begun)
    if missed and command.bars:
        print(f"bellbox: the demo did not reach its bar: {'; '.join(missed)}", file=sys.stderr)
        raise SystemExit(1)


def demo_config(folder: Path, steps: int, precision: Precision) -> TrainConfig:
    """The run of the demo: the paper's recipe, sized for minutes on two cores.

    A quantized layer does not feel the scale of its weights, only how far a step turns them: learning rate over
    initial scale. With the small, noisy batches of a short run, the usual 1.2e-3 / 0.02 turns the weights until they
    are no longer bell-shaped, and the entropy of single layers falls under 1.95 bits; 1.4e-3 / 0.06 keeps it above.
    """
    return TrainConfig(
        folder=str(folder),
        model=ModelSection("tiny", {"initializer_range": 0.06}),
        data=DataSection(source="classics", context=256),
        quantization=QuantizationSection(method="bbq", bits=2, embedding_bits=EMBEDDING_BITS),
        optimizer=OptimizerSection(lr=1.4e-3),
        batch=BatchSection(tokens=4096, micro_sequences=8),
        steps=steps,
        precision=precision,
        device="cpu",
        eval_every=max(20, -(-steps // 6)),
        checkpoint_every=max(20, -(-steps // 3)),
        log_every=max(1, steps // 60),
        tensorboard=False,
    )


def run_demo(out: Path, steps: int, precision: Precision, begun: float) -> list[Bar]:
    """Everything between a claimed folder and its report.

    Args:
        out: the claimed folder.
        steps: optimizer steps.
        precision: of the training forward.
        begun: `time.monotonic()` at the start, for the headings.

    Returns:
        What was to be reached, and whether it was.
    """

    def heading(text: str) -> None:
        print(f"\n=== {text}  ({_clock(time.monotonic() - begun)})", flush=True)

    heading("1/6  train a LLaMA with 2-bit weights and activations on six novels")
    trainer = Trainer(demo_config(out / RUN, steps, precision))
    print(summary(trainer.model), flush=True)
    result = trainer.run()
    if result.stopped_by is not None:
        print(f"stopped at step {result.step} of {result.total_steps}; bellbox demo starts anew")
        raise SystemExit(128 + result.stopped_by)

    heading("2/6  pack it into integers")
    opened = open_model(out / RUN)
    sizes = pack(opened, out / PACKED)
    show_sizes(sizes, out / PACKED)

    heading("3/6  prove that the packed model is the trained one")
    checked = agreement(opened.model, io.load(out / PACKED), check_batches(opened))
    print(describe(checked))

    heading("4/6  evaluate the packed model on a seventh novel")
    packed = open_model(out / PACKED)
    found = evaluate(packed, "classics", context=opened.context)
    show(found)

    heading("5/6  let it write")
    sample = _write(out / PACKED)

    heading("6/6  the report")
    page = collect(opened, packed=packed, sample=sample, checked=checked)
    write_file(out / REPORT, render(replace(page, title="A 2-bit language model, from text to integers")))
    history = [record["bits_per_byte"] for record in page.record.evals]
    bars = judge(found, sizes, checked, history)
    for bar in bars:
        print(f"  {'reached' if bar.reached else 'MISSED '}  {bar.what}")
    _record(out, found, sizes, checked, bars, time.monotonic() - begun)
    return bars


def judge(found: Evaluation, sizes: Sizes, checked: Agreement, history: list[float]) -> list[Bar]:
    """What the method promises, against what was measured.

    Args:
        found: evaluation of the packed model.
        sizes: of the packed model.
        checked: the packed model against the trained one.
        history: validation bits per byte during training, in order.
    """
    assert found.codes is not None
    assert found.floor is not None
    assert found.floor.bits_per_byte is not None
    name, lowest = min(found.codes.weight.items(), key=lambda item: item[1])
    bits, floor = found.result.bits_per_byte or float("inf"), found.floor.bits_per_byte
    limit = MOST_OF_UNIGRAM * floor
    return [
        Bar(
            f"weight entropy of every layer at least {LEAST_ENTROPY} bits: lowest {lowest:.4f} ({name})",
            lowest >= LEAST_ENTROPY,
        ),
        Bar(
            f"validation bits per byte clearly under the unigram model's {floor:.3f} (at most {limit:.3f}): {bits:.4f}",
            bits <= limit,
        ),
        Bar(
            "validation bits per byte fall to the end: " + " > ".join(f"{value:.3f}" for value in history),
            all(later < earlier for earlier, later in itertools.pairwise(history)),
        ),
        Bar(
            f"low-bit layers at most 1/{LEAST_RATIO} of bf16: 1/{sizes.ratio:.2f}",
            sizes.ratio >= LEAST_RATIO,
        ),
        Bar(
            f"packed equals trained: {checked.mismatches} of {checked.codes:,} codes differ, logits by "
            f"{checked.logit_difference:.1g}",
            checked.holds,
        ),
    ]


def _check_length(command: Demo) -> None:
    if command.steps is not None and command.minutes is not None:
        raise BellboxError("--steps and --minutes: give one of them")
    if command.steps is not None and command.steps < 1:
        raise BellboxError(f"--steps {command.steps}: must be at least 1")
    if command.minutes is not None and not 0 < command.minutes < 1e5:
        raise BellboxError(f"--minutes {command.minutes}: must be above 0")


def _seconds_per_step(precision: Precision) -> float:
    """Of the demo's model, on random tokens; the quickest of a few, so that a busy moment does not count."""
    config = resolve(demo_config(Path("unused"), STEPS, precision), data.open("classics"))
    model = make_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    vocabulary: int = model.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    tokens = torch.randint(vocabulary, (config.batch.micro_sequences, config.data.context + 1))
    taken = []
    for _ in range(4):
        begun = time.monotonic()
        for _ in range(config.accumulation):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.monotonic() - begun)
    return min(taken)


def _claim(out: Path) -> Any:
    """Make the folder the demo's own and empty; returns what holds it until it is closed.

    Raises:
        BellboxError: the folder holds something else, is in use, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise BellboxError(f"{out}: is a file; name a new folder with --out")
    if out.is_dir() and any(out.iterdir()) and not _is_demo(out):
        raise BellboxError(f"{out}: holds something else than a demo; name a new or empty folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = lock(out)
        write_file(out / MARKER, json.dumps({"made_by": "bellbox demo", "finished": False}) + "\n")
        for name in (RUN, PACKED):
            if (out / name).exists():
                shutil.rmtree(out / name)
        (out / REPORT).unlink(missing_ok=True)
    except OSError as error:
        raise BellboxError(f"{out}: cannot be written ({error.strerror})") from None
    return handle


def _is_demo(folder: Path) -> bool:
    try:
        return read_json(folder / MARKER).get("made_by") == "bellbox demo"
    except BellboxError:
        return False


def _write(packed: Path) -> Sample:
    """Stream a paragraph from the packed model to the terminal."""
    settings = {"temperature": 0.8, "top_k": 40, "seed": 0}
    stream = continue_text(open_model(packed), PROMPT, **settings)
    print(PROMPT, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print(f"\n({speed_of(stream)})", flush=True)
    told = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in settings.items())
    return Sample(PROMPT, stream.text, f"From the packed model, {told}; {speed_of(stream)}.")


def _record(
    out: Path, found: Evaluation, sizes: Sizes, checked: Agreement, bars: list[Bar], seconds: float
) -> None:
    whole = io.file_bytes(out / PACKED)
    content = {
        "made_by": "bellbox demo",
        "finished": True,
        "seconds": round(seconds, 1),
        "evaluation": found.to_dict(),
        "sizes": {
            **asdict(sizes),
            "ratio": sizes.ratio,
            "file_bytes": whole,
            "bits_per_parameter": 8 * whole / sizes.parameters,
        },
        "agreement": asdict(checked),
        "bars": [asdict(bar) for bar in bars],
    }
    write_file(out / MARKER, json.dumps(content, indent=1) + "\n")


def _farewell(out: Path, seconds: float) -> None:
    packed = out / PACKED
    print(
        f"\ndone in {_clock(seconds)}\n"
        f"  {out / REPORT}   open it in a browser\n"
        f"  {out / RUN}/           the run: config.yaml, metrics.jsonl, checkpoints/\n"
        f"  {packed}/        the packed model\n"
        f"  {out / MARKER}     the numbers\n"
        f"next:\n"
        f'  bellbox generate {packed} --prompt "The door opened" --temperature 0.8 --seed 1\n'
        f"  bellbox eval {packed} --stride 64\n"
        f"  bellbox train --folder runs/four-bits --quantization.bits 4 --steps 500\n"
        f"  bellbox data prepare my-book.txt --out data/my-book"
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
