"""A prompt's tokens are those of data preparation, whatever the tokenizer adds, cuts or pads by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bellbox.data.tokenizer import Tokenizer, plain_ids
from bellbox.errors import BellboxError
from bellbox.inference.generation import generate_text
from bellbox.models import LlamaConfig, build

tokenizers = pytest.importorskip("tokenizers")
TEXT = "The dark night was cold. " * 50
SPECIAL = ["<s>", "</s>", "[CLS]", "[SEP]"]


def byte_level() -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def with_template(template: str) -> Callable[[], Any]:
    def make() -> Any:
        made, processors = byte_level(), tokenizers.processors
        names = [(name, made.token_to_id(name)) for name in SPECIAL]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
        return made

    return make


def with_processor(name: str) -> Callable[[], Any]:
    def make() -> Any:
        made, processors = byte_level(), tokenizers.processors
        ends = ("</s>", made.token_to_id("</s>")), ("<s>", made.token_to_id("<s>"))
        made.post_processor = {
            "bert": lambda: processors.BertProcessing(*ends),
            "roberta": lambda: processors.RobertaProcessing(*ends),
            "bytes": lambda: processors.ByteLevel(trim_offsets=True),
            "sequence": lambda: processors.Sequence(
                [processors.ByteLevel(), processors.BertProcessing(*ends)]
            ),
        }[name]()
        return made

    return make


def sentencepiece() -> Any:
    made = byte_level()
    made.normalizer = tokenizers.normalizers.Prepend("\u2581")
    return made


def set_oddly() -> Any:
    made = byte_level()
    made.enable_truncation(2)
    made.enable_padding(length=40, pad_id=3, pad_token="[SEP]")
    return made


MAKERS = {
    "plain": byte_level,
    "ends": with_template("<s> $A </s>"),
    "end": with_template("$A </s>"),
    "bert": with_processor("bert"),
    "roberta": with_processor("roberta"),
    "bytes": with_processor("bytes"),
    "sequence": with_processor("sequence"),
    "dummy prefix": sentencepiece,
    "cut and padded": set_oddly,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("prompt", ["The dark night", " was", "a </s> b<s>"])
def test_a_prompt_has_the_tokens_of_data_preparation(name: str, prompt: str) -> None:
    theirs = MAKERS[name]()
    before = theirs.to_str(), theirs.encode_special_tokens
    prepared = Tokenizer(theirs.to_str()).encode_batch([prompt])[0].tolist()
    model = build(LlamaConfig(300, 16, 32, 1, 2, max_position_embeddings=64), seed=0).eval()
    assert generate_text(model, theirs, prompt, 1, temperature=0).prompt_ids == prepared
    assert not {theirs.token_to_id(one) for one in SPECIAL} & set(prepared)
    assert (theirs.to_str(), theirs.encode_special_tokens) == before


def test_a_prompt_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(BellboxError, match=r"'\\udcff' is not text in UTF-8"):
        plain_ids(byte_level(), "\udcff")
