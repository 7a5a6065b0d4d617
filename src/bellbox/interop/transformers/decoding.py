"""Generation of a packed LLaMA, GPT-2 or OPT in short steps: the fused decode step of Bellbox under `model.generate`.

A decode step of transformers is some forty calls a block, and what `generate` does between steps is as much again
as a small packed model needs. So where nothing is asked for that needs transformers' own loop, the loop is a short one:
the same prompt pass, then two or three calls a block (`steps.py`) that write into the very cache of `generate`, be it
static or dynamic. Everything else (padding, beams, hooks, other dtypes, a cache that holds something already, outputs
beside the tokens) goes the ordinary way, through transformers' modules with packed layers in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from bellbox.interop.transformers.steps import Steps, steps_for

_ASKED = {
    "attention_mask",
    "past_key_values",
    "use_cache",
    "position_ids",
    "logits_to_keep",
    "cache_position",
}
"""What the short loop knows of the arguments of a forward."""


class ShortDecoding(nn.Module):
    """What the class of such a model adds to transformers' own: a loop of short steps, where it serves."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """See `GenerationMixin._sample`."""
        plain = not synced_gpus and _asks_for_tokens_alone(generation_config)
        limits = _limits(stopping_criteria) if plain else None
        cache = model_kwargs.get("past_key_values")
        steps = None
        if limits is not None and _is_known(self, input_ids, cache, model_kwargs):
            steps = steps_for(self, cache, len(input_ids), limits[0])
        if steps is None or limits is None:
            parent: Any = super()
            return parent._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        choose = _sampled if generation_config.do_sample else _likeliest
        pad = generation_config._pad_token_tensor
        return _loop(steps, input_ids, logits_processor, limits, choose, pad, streamer)


# --- whether ---


def _asks_for_tokens_alone(config: Any) -> bool:
    asked = (
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "is_assistant", "prefill_chunk_size",
    )  # fmt: skip
    return config.use_cache and not any(getattr(config, name, None) for name in asked)


def _limits(criteria: Any) -> tuple[int, frozenset[int]] | None:
    """Most tokens of a text, and the tokens that end one; None where there are other criteria."""
    longest, ends = None, frozenset[int]()
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            longest = each.max_length if longest is None else min(longest, each.max_length)
            if each.max_position_embeddings is not None and longest > each.max_position_embeddings:
                return None  # transformers warns
        elif type(each) is EosTokenCriteria:
            ends |= frozenset(each.eos_token_id.tolist())
        else:
            return None
    return None if longest is None else (longest, ends)


def _is_known(model: Any, input_ids: Tensor, cache: Any, asked: dict[str, Any]) -> bool:
    """Whether a plain loop over an empty cache gives what is asked for."""
    if set(asked) - _ASKED or input_ids.dim() != 2 or not input_ids.shape[1] or not input_ids.is_cpu:
        return False
    kinds = {StaticCache: StaticLayer, DynamicCache: DynamicLayer}
    if type(cache) not in kinds or getattr(cache, "offloading", False) or int(cache.get_seq_length()):
        return False
    if any(type(each) is not kinds[type(cache)] for each in cache.layers):
        return False
    mask = asked.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
        return False
    config = model.config
    if config.output_attentions or config.output_hidden_states or torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled("cpu") and not model.training


# --- the loop ---


def _likeliest(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def _sampled(scores: Tensor) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def _loop(
    steps: Steps,
    input_ids: Tensor,
    processors: Any,
    limits: tuple[int, frozenset[int]],
    choose: Callable[[Tensor], Tensor],
    pad: Tensor | None,
    streamer: Any,
) -> Tensor:
    """Token ids `[B, T]` to `[B, T + new]`, as `GenerationMixin._sample` gives them."""
    longest, ends = limits
    batch, prompt = input_ids.shape
    ids = input_ids.new_empty(batch, max(longest, prompt + 1))
    ids[:, :prompt] = input_ids
    going = [True] * batch
    logits = steps.prompt(input_ids)
    length = prompt
    try:
        while True:
            scores = logits.float()
            if len(processors):
                scores = processors(ids[:, :length], scores.clone())
            tokens = choose(scores)
            chosen = tokens.tolist()
            if not all(going):
                assert pad is not None
                chosen = [one if on else int(pad) for one, on in zip(chosen, going, strict=True)]
                tokens = torch.tensor(chosen)
            ids[:, length] = tokens
            length += 1
            if streamer is not None:
                streamer.put(tokens)
            going = [on and one not in ends for one, on in zip(chosen, going, strict=True)]
            if length >= longest or not any(going):
                break
            logits = steps.step(tokens[:, None])
    finally:
        steps.finish(prompt)
    if streamer is not None:
        streamer.end()
    return ids[:, :length]
