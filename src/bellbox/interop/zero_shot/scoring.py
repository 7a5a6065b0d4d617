"""Log-likelihoods and greedy continuations of token ids, by anything that maps ids to logits.

Nothing here knows lm-eval: a model is a callable, so that a run, a packed model, transformers' or a session of another
runtime are scored by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.inference.generation import generate


class Request(NamedTuple):
    """Tokens to be scored, and those before them."""

    context: list[int]
    """At least one."""
    continuation: list[int]


class Score(NamedTuple):
    """Of a continuation."""

    logprob: float
    """Sum of its tokens' log-probabilities, nats."""
    greedy: bool
    """Whether each of them is the likeliest."""


@torch.no_grad()
def scores(
    model: Callable[[Tensor], Any],
    requests: Sequence[Request],
    longest: int,
    batch: int,
    done: Callable[[list[int], list[Score]], None],
) -> None:
    """Score continuations, the longest first; rows of a batch are padded on the right, which a causal model ignores.

    Args:
        model: int64 `[B, T]` to logits `[B, T, vocab]`, or to an object with `.logits`.
        requests: what does not fit `longest` loses tokens of the context, from the left.
        longest: tokens that the model takes.
        batch: sequences at once.
        done: called after each batch with the places of its requests, and their scores.

    Raises:
        BellboxError: a continuation that is longer than the model takes, or logits that are not finite.
    """
    for place, request in enumerate(requests):
        if len(request.continuation) > longest:
            raise BellboxError(
                f"request {place + 1} scores {len(request.continuation)} tokens, but the model takes {longest}; "
                "choose a task of shorter answers, or a model with a longer context"
            )
    lengths = [len(request.context) + len(request.continuation) for request in requests]
    empty = [place for place, request in enumerate(requests) if not request.continuation]
    done(empty, [Score(0.0, True)] * len(empty))
    asked = set(range(len(requests))) - set(empty)
    order = sorted(asked, key=lambda place: (-lengths[place], place))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        rows = [_fitting(requests[place], longest) for place in places]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        logits = logits_of(model, ids)
        found = []
        for number, place in enumerate(places):
            wanted = torch.tensor(requests[place].continuation)
            end = len(rows[number])
            found.append(_score(logits[number, end - len(wanted) : end], wanted))
        done(places, found)


def _fitting(request: Request, longest: int) -> list[int]:
    """The last tokens that the model takes; the very last is only predicted."""
    return (request.context + request.continuation)[-(longest + 1) :][:-1]


def _score(logits: Tensor, wanted: Tensor) -> Score:
    logits = logits.to(torch.float32)
    if not bool(logits.isfinite().all()):
        raise BellboxError("the model's logits are not finite; is it trained?")
    each = logits.log_softmax(-1).gather(-1, wanted[:, None]).double().sum()
    return Score(float(each), bool((logits.argmax(-1) == wanted).all()))


def logits_of(model: Callable[[Tensor], Any], ids: Tensor) -> Tensor:
    """`[B, T, vocab]`, on the CPU."""
    if isinstance(model, nn.Module):
        ids = ids.to(next((p.device for p in model.parameters()), ids.device))
    found = model(ids)
    return getattr(found, "logits", found).cpu()


def continuation(
    model: Callable[[Tensor], Any], prompt: list[int], count: int, sampling: dict[str, Any]
) -> Iterator[int]:
    """Up to `count` tokens after a prompt, one at a time.

    Args:
        model: as for `scores`; one with a cache (`new_cache`) is asked for a token at a time.
        prompt: at least one token; with `count` it fits the model.
        count: tokens.
        sampling: `temperature` (0 is greedy), `top_k`, `top_p`, `seed`: arguments of `generate`.

    Raises:
        BellboxError: a value out of range.
    """
    ids = torch.tensor([prompt], dtype=torch.int64)
    if isinstance(model, nn.Module) and hasattr(model, "new_cache"):
        for token in generate(model, ids, count, **sampling):
            yield int(token)
        return
    if sampling.get("temperature", 0) != 0:
        raise BellboxError(
            "this model has no cache of Bellbox's, and is asked greedily only: set temperature: 0"
        )
    for _ in range(count):
        with torch.no_grad():
            token = int(logits_of(model, ids)[0, -1].argmax())
        yield token
        ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
