"""What LLaMA and GPT have in common: a body, a head over the vocabulary, and a cache of keys and values."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.models.cache import KVCache
from bellbox.models.config import GPTConfig, LlamaConfig
from bellbox.models.head import next_logits
from bellbox.ops.cache_codes import CachePrecision

Config = TypeVar("Config", LlamaConfig, GPTConfig)


class CausalLM(nn.Module, Generic[Config]):
    """A language model. A subclass puts its body where its checkpoints have it, and names it.

    Attributes:
        config: its shape.
        exact_attention: set it to True for logits of a prefix that depend neither on what follows nor on the
            rest of the batch, where the compiled kernels do not run (`attention.py` says why and what it costs).
            False by default: the kernels, or PyTorch's fused attention.
    """

    body_name: str
    """Attribute that holds the body: called with ids, cache, last_only and exact, it gives normalised states."""

    def __init__(self, config: Config, body: nn.Module) -> None:
        super().__init__()
        self.config: Config = config
        self.exact_attention = False
        self.add_module(self.body_name, body)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        self.tie_weights()

    @property
    def embedding(self) -> nn.Embedding:
        """The table of the tokens' vectors."""
        raise NotImplementedError

    @property
    def norm_weight(self) -> Tensor:
        """Gains of the last norm: never quantized, so its dtype and device are the model's."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Make the head the embedding matrix, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    def new_cache(self, batch: int, max_length: int, precision: CachePrecision = "fp32") -> KVCache:
        """An empty cache on this model's device, for `batch` sequences of up to `max_length` tokens.

        Args:
            batch: sequences.
            max_length: tokens of each.
            precision: int8 and int4 code the rows (`ops/cache_codes.py`); fp32 keeps them in the model's dtype.

        Raises:
            BellboxError: more tokens than the context, or no such precision.
        """
        config, weight = self.config, self.norm_weight
        check_context(max_length, config.max_position_embeddings)
        return KVCache(
            config.num_hidden_layers,
            batch,
            config.key_value_heads,
            max_length,
            config.head_size,
            precision=precision,
            dtype=weight.dtype,
            device=weight.device,
        )

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits for the token after each one.

        Args:
            input_ids: `[B, T]` int64.
            cache: holds the tokens before these and takes these in; None where these are all.
            last_only: the head for the last token only, which is all that sampling needs.

        Returns:
            `[B, T, vocab_size]`, or `[B, 1, vocab_size]`; fp32, or autocast's dtype where that is on.

        Raises:
            BellboxError: more tokens than the context or the cache has room for.
        """
        batch, tokens = input_ids.shape
        before = cache.length if cache is not None else 0
        check_context(before + tokens, self.config.max_position_embeddings)
        if cache is not None:
            cache.check_room(batch, tokens)
        states = getattr(self, self.body_name)(input_ids, cache, last_only, self.exact_attention)
        logits = next_logits(self.lm_head, states)
        if cache is not None:
            cache.advance(tokens)
        return logits


def check_context(tokens: int, context: int) -> None:
    """Refuse more tokens than a model has positions for."""
    if tokens > context:
        raise BellboxError(
            f"{tokens} tokens exceed the model's context of {context} (max_position_embeddings); "
            "shorten the text"
        )
