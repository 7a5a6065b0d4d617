"""A model as lm-eval asks it: texts in, log-likelihoods and texts out.

The beginning token stands where it belongs, once: in front of a text where the tokenizer puts one there, and in front
of what has no context (an empty one, or a whole document, for rolling perplexity), where else the end of a text does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from torch import Tensor, nn

from bellbox.convert import require_causal
from bellbox.data.beginning import beginning_token, chat_template, prefix_token, tokenizer_of
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError, require
from bellbox.interop.zero_shot.scoring import Request, Score, continuation, scores

_MOST_NEW_TOKENS = 256
"""Where a task does not say; lm-eval's own default."""


@dataclass
class Cuts:
    """What did not fit the model."""

    contexts: int = 0
    """Requests that lost tokens on the left."""
    generations: list[tuple[int, int]] = field(default_factory=list)
    """Tokens asked for and tokens made, where the latter are fewer."""


class BellboxLM(LM):
    """Anything that maps token ids to logits, with a tokenizer.

    Args:
        model: int64 `[B, T]` to logits `[B, T, vocab]`, or to an object with `.logits`; causal.
        tokenizer: a `tokenizer.json` or sentencepiece `.model`.
        longest: tokens that the model takes.
        batch: sequences at once.
        info: what a results file shall say of the model.

    Raises:
        BellboxError: a model that is not causal, or a tokenizer that cannot be read.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        tokenizer: Path,
        longest: int,
        batch: int = 8,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, nn.Module):
            require_causal(model, "scoring tasks")
        self._device = torch.device("cpu")
        self.model, self.longest, self.batch, self.info = model, longest, batch, info or {}
        self.texts = tokenizer_of(tokenizer)
        # Names of special tokens in a prompt are these tokens, as a chat template writes them.
        self._backend: Any = require("tokenizers", "cli").Tokenizer.from_str(self.texts.text)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.begin = beginning_token(tokenizer, self.texts)
        self.prefix_token_id = prefix_token(tokenizer, self.texts)
        """What stands before a text without a context."""
        self._template = chat_template(tokenizer)
        self.cuts = Cuts()

    # --- tokens ---

    def tok_encode(self, text: str, begin: bool = True) -> list[int]:
        """Token ids, the beginning token in front where the tokenizer wants one and the text has it not yet."""
        ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        if begin and self.begin is not None and ids[:1] != [self.begin]:
            ids.insert(0, self.begin)
        return ids

    def encode_pair(self, context: str, text: str) -> Request:
        """A context and what is scored after it; spaces at the context's end belong to the latter."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, text = context[:-spaces], context[-spaces:] + text
        if not context:
            return Request([self.prefix_token_id], self._without_prefix(self.tok_encode(text, begin=False)))
        before = self.tok_encode(context)
        return Request(before, self.tok_encode(context + text)[len(before) :])

    def _without_prefix(self, ids: list[int]) -> list[int]:
        return ids[1:] if ids[:1] == [self.prefix_token_id] else ids

    # --- what lm-eval asks ---

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each `(context, continuation)`: its log-likelihood, and whether greedy decoding would give it."""
        arguments = [request.args for request in requests]
        pairs = [self.encode_pair(*each) for each in arguments]
        self.cuts.contexts += sum(len(a) + len(b) > self.longest + 1 for a, b in pairs)
        found: dict[int, Score] = {}

        def done(places: list[int], made: list[Score]) -> None:
            for place, score in zip(places, made, strict=True):
                found[place] = score
                self.cache_hook.add_partial("loglikelihood", arguments[place], tuple(score))

        scores(self.model, pairs, self.longest, self.batch, done)
        return [(found[place].logprob, found[place].greedy) for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Of whole texts: windows that share one token, each token scored once, documents apart."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self._without_prefix(self.tok_encode(request.args[0], begin=False))
            for window in rolling_windows(ids, self.prefix_token_id, self.longest):
                windows.append(window)
                owners.append(owner)
        totals = [0.0] * len(requests)

        def done(places: list[int], made: list[Score]) -> None:
            for place, score in zip(places, made, strict=True):
                totals[owners[place]] += score.logprob

        scores(self.model, windows, self.longest, self.batch, done)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Continuations up to the first of the stopping texts; greedy unless the task says otherwise."""
        found = []
        for request in requests:
            text, options = request.args
            found.append(self._generate(text, dict(options)))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _generate(self, text: str, options: dict[str, Any]) -> str:
        until = options.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        asked = int(options.pop("max_gen_toks", options.pop("max_new_tokens", _MOST_NEW_TOKENS)))
        if asked < 1:
            raise BellboxError(f"a task asks for {asked} new tokens; it must be at least 1")
        prompt = self.tok_encode(text) or [self.prefix_token_id]
        count, kept = room_for(len(prompt), asked, self.longest)
        self.cuts.contexts += kept < len(prompt)
        if count < asked:
            self.cuts.generations.append((asked, count))
        ids: list[int] = []
        for token in continuation(self.model, prompt[-kept:], count, _sampling(options)):
            if token == self.texts.end_of_text:
                break
            ids.append(token)
            made = self._backend.decode(ids, skip_special_tokens=True)
            if any(stop and stop in made for stop in stops):
                break
        made = self._backend.decode(ids, skip_special_tokens=True)
        ends = [made.find(stop) for stop in stops if stop]
        return made[: min([end for end in ends if end >= 0], default=len(made))]

    # --- conversations, and what a results file says ---

    def require_chat_template(self) -> str:
        """The template of conversations.

        Raises:
            BellboxError: none lies beside the tokenizer.
        """
        if self._template is None:
            raise BellboxError("no chat template lies with the model (chat_template.jinja); leave out --chat")
        return self._template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, by the template beside the tokenizer.

        Raises:
            BellboxError: there is none, or it refuses.
        """
        template = self.require_chat_template()
        jinja: Any = require("jinja2.sandbox", "lm-eval")

        def refuse(reason: str) -> None:
            raise BellboxError(f"the chat template refuses: {reason}")

        environment = jinja.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        names = {number: name for name, number in self.texts.vocab.items()}
        try:
            return environment.from_string(template).render(
                messages=chat_history,
                add_generation_prompt=add_generation_prompt,
                bos_token="" if self.begin is None else names[self.begin],
                eos_token=names[self.texts.end_of_text],
            )
        except BellboxError:
            raise
        except Exception as error:  # of a template that somebody else wrote
            raise BellboxError(f"the chat template cannot be used: {error}") from None

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, for the results file."""
        return self._template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's identity, for the harness's cache of requests."""
        return self.texts.sha256

    def get_model_info(self) -> dict[str, Any]:
        """For the results file."""
        return self.info


def rolling_windows(ids: list[int], prefix: int, longest: int) -> list[Request]:
    """A text in windows: the first after the prefix, each later one after the last token of the one before.

    Args:
        ids: of the text.
        prefix: token in front.
        longest: tokens that the model takes.
    """
    whole = [prefix, *ids]
    found = []
    for start in range(0, len(ids), longest):
        end = min(start + longest, len(ids))
        # As lm-eval does it: a later window is as long as the model takes, and scores only its own tokens.
        first = max(0, end - longest) if start else 0
        found.append(Request(whole[first : start + 1], whole[start + 1 : end + 1]))
    return found


def room_for(prompt: int, asked: int, longest: int) -> tuple[int, int]:
    """How many tokens are made, and how many of the prompt's last ones are kept.

    A prompt that leaves no room loses tokens on the left, as in lm-eval. Where as much is asked for as the model takes
    at all, the prompt stays instead, up to half of the context, and fewer are made.
    """
    if asked < longest:
        return asked, min(prompt, longest - asked)
    kept = min(prompt, max(1, longest // 2))
    return max(1, longest - kept), kept


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """`generate`'s arguments from those of a task."""
    for name in ("do_sample", "temperature", "top_k", "top_p", "seed"):
        options.setdefault(name, None)
    sample, temperature = options.pop("do_sample"), options.pop("temperature")
    found = {name: options.pop(name) for name in ("top_k", "top_p", "seed")}
    if options:
        raise BellboxError(f"a task generates with {next(iter(options))!r}, which Bellbox does not know")
    greedy = sample is False or temperature == 0 or (sample is None and temperature is None)
    if greedy:
        return {"temperature": 0.0}
    return {"temperature": 1.0 if temperature is None else float(temperature), **found}


def fingerprint(model: nn.Module, tokenizer: Tokenizer, extra: str = "") -> str:
    """What answers depend on: every tensor, how layers compute, the tokenizer."""
    digest = hashlib.sha256(json.dumps([repr(model), tokenizer.sha256, extra]).encode())
    for name, tensor in model.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
