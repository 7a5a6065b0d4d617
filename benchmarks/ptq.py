"""Perplexity of a trained model before and after binarization, by method and width of activations.

python benchmarks/ptq.py MODEL --calibration fit.txt --evaluation valid.txt --samples 16 --context 512 --folder models
python benchmarks/ptq.py MODEL ... --methods billm:released,dbellquant:clean:1

Binarized models stay in the folder, and those that are there already are scored only. A method is
NAME[:VARIANT[:POWER[:EXPONENT]]]. Texts as for `bellbox data prepare`; results go to standard output as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from bellbox.data.tokenizer import Tokenizer
from bellbox.evaluation import perplexity
from bellbox.models import load_hf
from bellbox.ptq import Job, Settings, binarize_folder, is_binarized, load, set_activation_bits, stored_size
from bellbox.ptq.calibration import calibration_tokens
from bellbox.utils.memory import peak_memory

METHODS = "rtn,billm:released,billm:clean,dbellquant:released,dbellquant:clean"


def report(**values: object) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--scored", type=int, default=8, help="sequences to score")
    parser.add_argument("--widths", type=int, nargs="*", default=[16, 8, 6], help="of activations, to score")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = calibration_tokens(
        Tokenizer.load(options.model), options.evaluation, options.scored, options.context
    ).flatten()
    if options.widths:
        score = perplexity(load_hf(options.model), text, options.context)
        report(method="none", perplexity=score.perplexity, protocol=score.protocol)
    for name in options.methods.split(","):
        method, variant, power, exponent = [*name.split(":"), *("clean", "2", "")[name.count(":") :]]
        start = float(exponent) if exponent else None
        settings = Settings(method=method, variant=variant, power=int(power), exponent=start)  # pyright: ignore
        out, begun = (
            options.folder / "-".join(filter(None, (method, variant, power, exponent))),
            time.monotonic(),
        )
        if not is_binarized(out):
            binarize_folder(
                Job(options.model, out, options.calibration, settings, options.samples, options.context),
                show=options.show,
            )
            report(made=str(out), seconds=round(time.monotonic() - begun, 1), peak=peak_memory())
        record = json.loads((out / "ptq.json").read_text())
        model, scores = load(out), {}
        for bits in options.widths:
            set_activation_bits(model, bits)
            scores[bits] = perplexity(model, text, options.context).perplexity
        errors = [layer["error"] for block in record["blocks"] for layer in block["layers"].values()]
        groups = [group for block in record["blocks"] for group in block["groups"]]
        report(
            method=method,
            variant=variant,
            power=settings.power,
            exponent=settings.exponent,
            perplexity=scores,
            error=sum(errors) / len(errors),
            steps=[group["steps"] for group in groups],
            bits_per_weight=stored_size(model).bits_per_weight,
            seconds=sum(block["seconds"] for block in record["blocks"]),
        )


if __name__ == "__main__":
    main()
