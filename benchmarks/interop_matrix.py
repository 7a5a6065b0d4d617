"""Every runtime beside the trained model: codes, outputs, bytes and time, for each width and kind of model.

python benchmarks/interop_matrix.py --out matrix.json             # some minutes; one thread
python benchmarks/interop_matrix.py --out matrix.json --models llama --widths 2 3
python benchmarks/interop_matrix.py --page docs/interop.md --out matrix.json     # fills the table of the page

Models are small, of random weights; their activation scales come from one batch. The packed model in torch is what the
others are held against, and it is held against the fake-quantized one. *Codes* are those that differ from it, for the
same input where the runtime computes its own inputs (onnxruntime). *Difference* is the largest of two outputs over the
largest output. GGUF has weights only: its codes are the weights', decoded from the file.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.evaluation.codes import agreement, low_bit_layers
from bellbox.formats.packed import file_bytes
from bellbox.inference.decoding import steps_for
from bellbox.models import GPT, GPTConfig, Llama, LlamaConfig, ResNetConfig, build

WIDTHS = ("1", "2", "3", "4", "ternary")
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CALLS = 30


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 8),
    )


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "LLaMA":
        return build(LlamaConfig(**SHAPE, intermediate_size=512), seed=0)
    if kind == "GPT":
        return build(GPTConfig(**SHAPE), seed=0)
    return build(ResNetConfig(width=16, stages=2, num_labels=4), seed=0) if kind == "ResNet" else mlp()


KINDS = ("LLaMA", "GPT", "MLP", "ResNet")


def inputs(kind: str, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("LLaMA", "GPT"):
        return torch.randint(0, SHAPE["vocab_size"], (2, 24), generator=generator)
    return torch.randn(8, *((3, 16, 16) if kind == "ResNet" else (64,)), generator=generator)


def recipe(width: str, **more: Any) -> bb.Recipe:
    return bb.Recipe.bbq(levels=3, **more) if width == "ternary" else bb.Recipe.bbq(int(width), **more)


@dataclasses.dataclass
class Case:
    """A kind and width: the trained model, and its packed form."""

    kind: str
    width: str
    trained: nn.Module
    packed: nn.Module
    folder: Path

    @classmethod
    def of(cls, kind: str, width: str, folder: Path) -> Case:
        trained = bb.prepare(network(kind), recipe(width))
        trained(inputs(kind))
        trained.eval()
        packed = bb.convert(trained)
        for model in (trained, packed):  # the way of evaluation that does not depend on lengths
            if isinstance(model, Llama | GPT):
                model.exact_attention = True
        bb.save(packed, folder / "packed")
        return cls(kind, width, trained, packed, folder)


@dataclasses.dataclass
class Cell:
    """What one runtime gave."""

    codes: str
    difference: float | None
    size: int | None
    milliseconds: float | None


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of processor time, the least of some calls."""
    call()
    best = float("inf")
    for _ in range(CALLS):
        begun = time.process_time()
        call()
        best = min(best, time.process_time() - begun)
    return 1e3 * best


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def wrong_codes(case: Case, other: nn.Module, name: Callable[[str], str] = lambda name: name) -> str:
    """Codes of weights that are others than the packed model's."""
    found = low_bit_layers(case.packed)
    theirs = dict(other.named_modules())
    pairs = [(layer, theirs[name(each)]) for each, layer in found.items()]
    total = sum(layer.weight_codes().numel() for layer, _ in pairs)
    wrong = sum(int((a.weight_codes() != b.weight_codes()).sum()) for a, b in pairs)  # type: ignore[operator]
    return f"{wrong} of {total:,}"


def wrong_joined_codes(case: Case, other: nn.Module) -> str:
    """The same of a GPT-2 of transformers, where q, k and v are one layer."""
    ours, theirs = low_bit_layers(case.packed), dict(other.named_modules())
    wrong = total = 0
    for name, layer in ours.items():
        if name.endswith(("k_proj", "v_proj")):
            continue
        codes = layer.weight_codes()  # type: ignore[operator]
        if name.endswith("q_proj"):
            three = [
                ours[name.replace("q_proj", each)].weight_codes() for each in ("q_proj", "k_proj", "v_proj")
            ]  # type: ignore[operator]
            name, codes = name.replace("q_proj", "c_attn"), torch.cat(three)
        wrong += int((theirs[name].weight_codes() != codes).sum())  # type: ignore[operator]
        total += codes.numel()
    return f"{wrong} of {total:,}"


def one_call(case: Case, model: nn.Module) -> Callable[[], Any]:
    """One new token of a language model, else one sample."""
    x = inputs(case.kind)[:1]
    if isinstance(model, Llama | GPT):
        model = copy.copy(model)  # the same layers, without exact attention
        model.exact_attention = False
        cache = model.new_cache(1, 64)
        model(x, cache=cache)
        steps, token, length = steps_for(model, cache), x[:, :1], cache.length

        def step() -> None:
            cache.length = length
            steps.step(token) if steps is not None else model(token, cache=cache)

        return step
    return lambda: model(x)


def fake_quantized(case: Case) -> Cell:
    found = agreement(case.trained, case.packed, [inputs(case.kind, 2)])
    return Cell(
        f"{found.mismatches} of {found.codes:,}",
        found.logit_difference,
        None,
        timed(one_call(case, case.trained)),
    )


def packed(case: Case) -> Cell:
    loaded = bb.load(case.folder / "packed", into=None if case.kind not in ("MLP",) else mlp())
    if isinstance(loaded, Llama | GPT):
        loaded.exact_attention = True
    x = inputs(case.kind, 2)
    return Cell(
        wrong_codes(case, loaded),
        difference(loaded(x), case.packed(x)),
        file_bytes(case.folder / "packed"),
        timed(one_call(case, loaded)),
    )


def transformers(case: Case) -> Cell | None:
    if case.kind not in ("LLaMA", "GPT"):
        return None
    from transformers import AutoModelForCausalLM

    from bellbox.interop.transformers.export import export_packed

    export_packed(case.packed, case.folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(case.folder / "hf")
    x, prompt = inputs(case.kind, 2), inputs(case.kind)[:1]
    case.packed.exact_attention = False  # type: ignore[assignment]
    ours = case.packed(x)
    case.packed.exact_attention = True  # type: ignore[assignment]
    codes = wrong_codes(case, model) if case.kind == "LLaMA" else wrong_joined_codes(case, model)
    tokens = 32
    once = timed(
        lambda: model.generate(prompt, max_new_tokens=tokens, do_sample=False, min_new_tokens=tokens)
    )
    return Cell(codes, difference(model(x).logits, ours), file_bytes(case.folder / "hf"), once / tokens)


def onnxruntime(case: Case) -> Cell:
    import onnxruntime as runtime

    from bellbox.interop.onnx import export, export_model
    from bellbox.interop.onnx.check import agreement as compare

    path, x = case.folder / "model.onnx", inputs(case.kind, 2)
    if case.kind == "MLP":
        export(case.packed, (x,), path)
    else:
        export_model(case.packed, path)
    found = compare(case.packed, path, [x])
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    milliseconds = None
    if case.kind in ("MLP", "ResNet"):
        feeds = {session.get_inputs()[0].name: x[:1].numpy()}
        milliseconds = timed(lambda: session.run(None, feeds))
    else:
        from bellbox.interop.onnx.check import _language_feeds

        feeds = _language_feeds(session, x[:1])
        milliseconds = timed(lambda: session.run(None, feeds)) / x.shape[1]  # a prompt's tokens
    worst = max(found.difference, found.difference_moved)
    return Cell(f"{found.wrong + found.ties} of {found.codes:,}", worst, path.stat().st_size, milliseconds)


def torchao(case: Case) -> Cell | None:
    from torchao import quantize_

    width: dict[str, Any] = {"levels": 3} if case.width == "ternary" else {"bits": int(case.width)}
    config = bb.interop.TorchAOConfig(**width)
    model = network(case.kind)
    quantize_(model, config, filter_fn=bb.interop.torchao_filter(model, config))
    model(inputs(case.kind))
    model.eval()
    x = inputs(case.kind, 2)
    expected = model(x)
    again = dataclasses.replace(config, step="convert")
    quantize_(model, again, filter_fn=bb.interop.torchao_filter(model, again))
    return Cell(wrong_codes(case, model), difference(model(x), expected), None, timed(one_call(case, model)))


def gguf_weights(case: Case) -> Cell | None:
    if case.kind not in ("LLaMA", "GPT"):
        return None
    from bellbox.interop.gguf.export import export_gguf

    model = build(GPTConfig(**SHAPE, activation="gelu"), seed=0) if case.kind == "GPT" else network(case.kind)
    model = bb.convert(bb.prepare(model, recipe(case.width, block=1, weight_only="float")).eval())
    path = case.folder / "model.gguf"
    export_gguf(model, path)  # decodes every block again and compares; raises where a code is another
    count = sum(layer.weight_codes().numel() for layer in low_bit_layers(model).values())  # type: ignore[operator]
    return Cell(f"0 of {count:,}, weights", None, path.stat().st_size, None)


def lm_eval(case: Case) -> Cell | None:
    """Log-likelihoods of random answers, as `bellbox eval --tasks` scores them: packed beside trained."""
    if case.kind not in ("LLaMA", "GPT"):
        return None
    from bellbox.interop.zero_shot.scoring import Request, scores

    ids = inputs(case.kind, 2).tolist()
    requests = [Request(row[:12], row[12:]) for row in ids]
    found: dict[str, list[float]] = {}
    for name, model in (("trained", case.trained), ("packed", case.packed)):
        got: dict[int, float] = {}
        scores(
            model,
            requests,
            128,
            2,
            lambda at, made, got=got: got.update(zip(at, (m[0] for m in made), strict=True)),
        )
        found[name] = [got[i] for i in range(len(requests))]
    ours, theirs = torch.tensor(found["packed"]), torch.tensor(found["trained"])
    return Cell("see packed", difference(ours, theirs), None, None)


RUNTIMES: dict[str, Callable[[Case], Cell | None]] = {
    "fake-quantized": fake_quantized,
    "packed, from its folder": packed,
    "transformers": transformers,
    "onnxruntime": onnxruntime,
    "torchao": torchao,
    "GGUF": gguf_weights,
    "lm-eval": lm_eval,
}


@torch.no_grad()
def cells(kinds: list[str], widths: list[str]) -> Iterator[dict[str, Any]]:
    """One a kind, width and runtime; what one refuses is said."""
    for kind in kinds:
        for width in widths:
            with tempfile.TemporaryDirectory() as place:
                case = Case.of(kind, width, Path(place))
                for name, run in RUNTIMES.items():
                    row: dict[str, Any] = {"model": kind, "width": width, "runtime": name}
                    try:
                        cell = run(case)
                    except BellboxError as error:
                        yield {**row, "refused": str(error)}
                        continue
                    if cell is not None:
                        yield {**row, **dataclasses.asdict(cell)}


def line(each: dict[str, Any]) -> str:
    """One cell, for the terminal."""
    where = f"{each['model']:7} {each['runtime']:24} {each['width']:8}"
    if "refused" in each:
        return f"{where} refused: {each['refused']}"
    size, spent = _many([each], "size", ","), _many([each], "milliseconds", ".3f")
    return f"{where} {each['codes']:32} {_far([each]):8} {size:>10} {spent}"


def _far(cells: list[dict[str, Any]]) -> str:
    found = [each["difference"] for each in cells if each["difference"] is not None]
    return "" if not found else f"{max(found):.1e}" if max(found) else "0"


def _many(cells: list[dict[str, Any]], key: str, how: str) -> str:
    return " / ".join(
        "-" if each[key] is None else format(each[key], how) for each in cells if each[key] is not None
    )


def table(found: list[dict[str, Any]]) -> str:
    """In Markdown: a row a kind and runtime, all widths in it."""
    widths = list(dict.fromkeys(each["width"] for each in found))
    named = " / ".join(widths)
    lines = [
        f"| model | runtime | codes that differ | difference | bytes, {named} | ms, likewise |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(each["model"] for each in found):
        for runtime in dict.fromkeys(each["runtime"] for each in found):
            cells = [each for each in found if (each["model"], each["runtime"]) == (kind, runtime)]
            refused = [f"{each['width']} refused" for each in cells if "refused" in each]
            cells = [each for each in cells if "refused" not in each]
            if not cells and not refused:
                continue
            parts = [each["codes"].split(" of ") for each in cells]
            counted = [part for part in parts if len(part) == 2]
            wrong = sum(int(part[0]) for part in counted)
            of = sum(int(part[1].split(",  ")[0].replace(",", "").split()[0]) for part in counted)
            codes = f"{wrong} of {of:,}" if counted else (cells[0]["codes"] if cells else "")
            codes = ", ".join([codes, *refused])
            sizes, spent = _many(cells, "size", ","), _many(cells, "milliseconds", ".2f")
            lines.append(f"| {kind} | {runtime} | {codes} | {_far(cells)} | {sizes} | {spent} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or fill the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.page is not None:
        found = json.loads(options.out.read_text(encoding="utf-8"))
        page = options.page.read_text(encoding="utf-8")
        filled = f"<!-- matrix -->\n\n{table(found)}\n\n<!-- /matrix -->"
        page = re.sub(r"<!-- matrix -->.*?<!-- /matrix -->", lambda _: filled, page, flags=re.DOTALL)
        options.page.write_text(page, encoding="utf-8")
        return
    found = []
    for cell in cells(options.models, options.widths):
        found.append(cell)
        print(line(cell), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
