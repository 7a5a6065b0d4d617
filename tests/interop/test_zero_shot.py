"""Zero-shot tasks: against lm-eval's own model of transformers, and what users of lm-eval ran into."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bellbox as bb
from bellbox.cli.main import main
from bellbox.data.tokenizer import Tokenizer
from bellbox.formats import packed as io
from bellbox.models import LlamaConfig, build, load_hf, save_hf

pytest.importorskip("lm_eval")

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bellbox.interop.zero_shot import BellboxLM, zero_shot
from bellbox.interop.zero_shot.adapter import fingerprint, rolling_windows, room_for

WHOLE = os.environ.get("BELLBOX_ZOO") == "all"
TEXT = "the quick brown fox jumps over the lazy dog, again and again; and why not? It is 1984! " * 60
QUESTIONS = [
    {"q": "The fox jumps over the", "choices": ["lazy dog", "brown fox", "quick"], "a": 0},
    {"q": "The dog is", "choices": ["again", "lazy", "why not"], "a": 1},
    {"q": "It is", "choices": ["1984!", "and again", "the lazy dog over the lazy dog"], "a": 0},
    {"q": "Why", "choices": ["not?", "dog", "quick brown"], "a": 0},
]
CHOICE = """
task: fox_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/questions.jsonl}, cache_dir: FOLDER/cache}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
ROLLING = """
task: fox_text
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/texts.jsonl}, cache_dir: FOLDER/cache}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
metadata: {version: 2.0}
"""
WRITING = """
task: fox_writing
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/questions.jsonl}, cache_dir: FOLDER/cache}
validation_split: validation
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["dog"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""
TASKS = ["fox_choice", "fox_text", "fox_writing"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    texts = [TEXT[:900], TEXT[30:80], "dog"]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, text in zip(TASKS, (CHOICE, ROLLING, WRITING), strict=True):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face folder of random weights, large enough that logits differ."""
    place = tmp_path_factory.mktemp("hf") / "llama"
    tokenizer = Tokenizer.train([TEXT], 300)
    config = LlamaConfig(
        tokenizer.vocab_size, 32, 64, 2, 4, max_position_embeddings=64, initializer_range=0.3
    )
    save_hf(build(config, seed=0), place)
    tokenizer.save(place / "tokenizer.json")
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return place


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def own(folder: Path, **more: Any) -> BellboxLM:
    return BellboxLM(load_hf(folder), folder / "tokenizer.json", 64, **{"batch": 3, **more})


def test_the_numbers_are_those_of_the_harness_s_own_model(folder: Path, tasks: Path) -> None:
    """The same folder, opened by transformers and asked by lm-eval's `hf`."""
    pytest.importorskip("transformers")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    loaded = TaskManager(include_path=str(tasks), include_defaults=False).load(list(TASKS))
    raw: Any = evaluate(theirs, loaded, log_samples=False, bootstrap_iters=1000)
    found = zero_shot(own(folder), TASKS, include=tasks)
    assert len(found.scores) == 6
    for score in found.scores:
        expected = raw["results"][score.task][f"{score.metric},none"]
        assert math.isclose(score.value, expected, rel_tol=1e-5), score
    choice = next(score for score in found.scores if score.metric == "acc")
    assert choice.stderr == pytest.approx(raw["results"]["fox_choice"]["acc_stderr,none"])
    assert (choice.documents, choice.shots, choice.version) == (4, 0, "1.0")
    requests = [asked(question["q"], f" {question['choices'][0]}") for question in QUESTIONS]
    requests += [asked("", "the fox"), asked("The dog ", "is"), asked(TEXT[:700], "again and again")]
    for (ours, ours_greedy), (other, other_greedy) in zip(
        own(folder).loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert ours == pytest.approx(other, rel=1e-5)
        assert ours_greedy == other_greedy
    writing = [
        asked(q["q"], {"until": ["dog", ","], "max_gen_toks": 10, "do_sample": False}) for q in QUESTIONS
    ]
    assert own(folder).generate_until(writing) == theirs.generate_until(writing)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 129, 200])
def test_windows_are_those_of_the_harness(length: int) -> None:
    ids = list(range(1, length + 1))
    theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 0, 64, 1))
    assert [tuple(window) for window in rolling_windows(ids, 0, 64)] == list(theirs)
    assert rolling_windows([], 0, 64) == []


class Seen:
    """A model that keeps the ids that it was asked for."""

    def __init__(self, size: int) -> None:
        self.rows: list[list[int]] = []
        self.size = size

    def __call__(self, ids: Tensor) -> Tensor:
        self.rows += ids.tolist()
        return torch.zeros(*ids.shape, self.size)


# lm-evaluation-harness issue 3333: the beginning token twice, perplexity inflated.
@pytest.mark.parametrize("added", [True, False])
def test_the_beginning_token_stands_once_where_it_belongs(folder: Path, tmp_path: Path, added: bool) -> None:
    tokenizer = Tokenizer.load(folder)
    begin = tokenizer.end_of_text
    (tmp_path / "tokenizer.json").write_text(tokenizer.text)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": added, "bos_token": "<|endoftext|>"})
    )
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}: ")
    seen = Seen(tokenizer.vocab_size)
    lm = BellboxLM(seen, tmp_path / "tokenizer.json", 64, batch=1)
    plain = tokenizer.encode("The fox jumps")

    def rows(ask: Any) -> list[list[int]]:
        seen.rows = []
        ask()
        return seen.rows

    scored = rows(lambda: lm.loglikelihood([asked("The fox", " jumps")]))
    assert scored == [[*([begin] if added else []), *plain][:-1]]
    for first in ("", "  "):
        empty = rows(lambda first=first: lm.loglikelihood([asked(first, "The fox jumps")]))
        ids = tokenizer.encode(f"{first}The fox jumps")
        assert empty == [[begin, *ids][:-1]]
    rolling = rows(lambda: lm.loglikelihood_rolling([asked("The fox jumps")]))
    assert rolling == [[begin, *plain[:-1]]]
    marked = rows(lambda: lm.loglikelihood_rolling([asked("<|endoftext|>The fox jumps")]))
    assert marked == rolling
    chat = lm.apply_chat_template([{"role": "user", "content": "The fox"}])
    assert chat == ("<|endoftext|>The fox: " if added else "The fox: ")
    talk = rows(lambda: lm.loglikelihood([asked(chat, "yes")]))
    assert talk[0].count(begin) == (1 if added else 0)
    made = rows(lambda: lm.generate_until([asked(chat, {"max_gen_toks": 1, "until": []})]))
    assert made[0].count(begin) == (1 if added else 0)
    nothing = rows(lambda: lm.generate_until([asked("", {"max_gen_toks": 1, "until": []})]))
    assert nothing == [[begin]]


# lm-evaluation-harness issue 4001: more tokens to generate than fit emptied the prompt.
def test_more_new_tokens_than_fit_leave_the_prompt(folder: Path) -> None:
    assert room_for(20, 128, 64) == (44, 20)
    assert room_for(20, 64, 64) == (44, 20)
    assert room_for(60, 128, 64) == (32, 32)
    assert room_for(20, 40, 64) == (40, 20)
    assert room_for(60, 40, 64) == (40, 24)
    assert room_for(1, 128, 2) == (1, 1)
    tokenizer = Tokenizer.load(folder)
    seen = Seen(tokenizer.vocab_size)
    lm = BellboxLM(seen, folder / "tokenizer.json", 64)
    prompt = tokenizer.encode(TEXT)[:20]
    lm.generate_until([asked(tokenizer.decode(prompt), {"max_gen_toks": 128, "until": []})])
    assert seen.rows[0] == prompt
    assert len(seen.rows[-1]) <= 64
    assert lm.cuts.generations == [(128, 44)]
    long = tokenizer.encode(TEXT)[:100]
    seen.rows = []
    lm.generate_until([asked(tokenizer.decode(long), {"max_gen_toks": 128, "until": []})])
    assert seen.rows[0] == long[-32:]
    assert lm.cuts.contexts == 1


# lm-evaluation-harness issue 4063: a cache of answers that was not keyed by the model.
def test_answers_kept_for_one_model_are_no_other_s(folder: Path, tasks: Path, tmp_path: Path) -> None:
    def scored(bits: int, cache: Path | None) -> list[float]:
        model = bb.prepare(load_hf(folder), bb.Recipe.bbq(bits)).eval()
        with torch.no_grad():
            model(torch.arange(16)[None])
        lm = BellboxLM(bb.convert(model), folder / "tokenizer.json", 64)
        return [score.value for score in zero_shot(lm, ["fox_text"], include=tasks, cache=cache).scores]

    cache = tmp_path / "answers"
    four, two = scored(4, cache), scored(2, cache)
    assert two == scored(2, None) != four
    assert scored(4, cache) == four
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_is_known_by_every_number_and_by_how_it_computes(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)

    def key(bits: int, change: float = 0.0) -> str:
        model = bb.prepare(load_hf(folder), bb.Recipe.bbq(bits)).eval()
        with torch.no_grad():
            model.model.norm.weight[0] += change
        return fingerprint(model, tokenizer)

    assert key(2) == key(2)
    assert len({key(2), key(2, 1e-3), key(4)}) == 3


def test_the_command_writes_a_table_and_a_whole_file(
    folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    flags = [
        "--tasks",
        "fox_choice,fox_text",
        "--include-path",
        str(tasks),
        "--limit",
        "3",
        "--batch-size",
        "2",
    ]
    main(["eval", str(folder), *flags, "--out", str(out)])
    said = capsys.readouterr().out
    assert "std. error" in said
    assert "lm-eval 0.4" in said
    assert "contexts of at most 64 tokens, no beginning token" in said
    written = json.loads(out.read_text())
    assert [(s["task"], s["metric"]) for s in written["scores"]][:2] == [
        ("fox_choice", "acc"),
        ("fox_choice", "acc_norm"),
    ]
    assert all(score["documents"] == 3 for score in written["scores"])
    assert written["kind"] == "huggingface"
    assert written["lm_eval"]["results"]["fox_choice"]["acc,none"] == written["scores"][0]["value"]


def test_a_packed_model_has_the_scores_of_the_trained_one(folder: Path, tasks: Path, tmp_path: Path) -> None:
    model = bb.prepare(load_hf(folder), bb.Recipe.bbq(2)).eval()
    with torch.no_grad():
        model(torch.arange(16)[None])
    io.save(bb.convert(model), tmp_path / "packed", tokenizer=folder / "tokenizer.json")
    requests = [asked(question["q"], f" {question['choices'][0]}") for question in QUESTIONS]
    trained = BellboxLM(model, folder / "tokenizer.json", 64).loglikelihood(requests)
    packed = BellboxLM(io.load(tmp_path / "packed"), folder / "tokenizer.json", 64).loglikelihood(requests)
    assert [score for score, _ in packed] == pytest.approx([score for score, _ in trained], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            ["--tasks", "fox_chase"],
            "no task 'fox_chase' in lm-eval or --include-path",
            marks=pytest.mark.skipif(not WHOLE, reason="reads all tasks of lm-eval: BELLBOX_ZOO=all"),
        ),
        (["--tasks", ","], "name at least one task"),
        (["--tasks", "fox_text", "--include-path", "nowhere"], "nowhere: no such folder of tasks"),
        (["--tasks", "fox_text", "--limit", "0"], "--limit is 0"),
        (["--tasks", "fox_text", "--stride", "4"], "--stride does not apply to zero-shot tasks"),
        (["--tasks", "fox_text", "--context", "65"], "--context 65: .* takes 2 to 64"),
        (["--limit", "3"], "--limit does not apply to an evaluation without --tasks"),
        (["--tasks", "fox_choice", "--chat"], "no chat template lies with the model"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    flags: list[str], message: str, folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--include-path" not in flags and "fox_chase" not in flags:
        flags = [*flags, *(["--include-path", str(tasks)] if "--tasks" in flags else [])]
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(folder), *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


def test_a_continuation_that_the_model_cannot_take_is_refused(folder: Path) -> None:
    with pytest.raises(bb.BellboxError, match=r"request 1 scores \d+ tokens, but the model takes 64"):
        own(folder).loglikelihood([asked("a", TEXT)])
    assert own(folder).loglikelihood([asked("a", "")]) == [(0.0, True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 0}, "asks for 0 new tokens"),
        ({"num_beams": 4}, "generates with 'num_beams'"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_options_of_generation_that_are_not_known(
    options: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(bb.BellboxError, match=message):
        own(folder).generate_until([asked("The fox", {"until": [], **options})])


def test_a_model_that_looks_at_the_whole_batch_is_refused(folder: Path) -> None:
    model = bb.prepare(load_hf(folder), bb.Recipe.bbq(2, granularity="tensor")).eval()
    with pytest.raises(bb.BellboxError, match="scoring tasks"):
        BellboxLM(model, folder / "tokenizer.json", 64)


@pytest.mark.parametrize(("attribute", "message"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "pictures")])
def test_tasks_of_more_than_text_are_refused(
    attribute: str, message: str, folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, attribute, True, raising=False)
    with pytest.raises(bb.BellboxError, match=message):
        zero_shot(own(folder), ["fox_choice"], include=tasks)


def test_data_that_cannot_be_had_is_one_line(folder: Path, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.yaml").write_text(
        (tasks / "fox_text.yaml").read_text().replace("texts.jsonl", "gone.jsonl")
    )
    with pytest.raises(bb.BellboxError, match=r"the data of fox_text cannot be had \(FileNotFoundError"):
        zero_shot(own(folder), ["fox_text"], include=tmp_path)


def test_samples_follow_their_seed(folder: Path) -> None:
    request = asked("The fox", {"until": [], "max_gen_toks": 12, "do_sample": True, "seed": 3})
    assert own(folder).generate_until([request]) == own(folder).generate_until([request])
