"""Memory that the layer-by-layer work takes, from the sizes alone: it decides whether a model fits."""

from __future__ import annotations

from bellbox.models.config import LlamaConfig, ModelConfig

_FLOAT = 4


def working_memory(config: ModelConfig, samples: int, context: int, batch: int) -> int:
    """Bytes at the worst moment, without Python and torch themselves (about 300 MiB).

    The larger of two moments: reading the embeddings, and binarizing a block. Then there are the hidden states of all
    samples, one block in fp32 (read, and its binarized weights decoded), the Hessians of its inputs, and the larger of
    what one batch leaves between the layers and of what the largest matrix needs: its inverse Hessian (three squares),
    or learning its scale (some ten copies).

    Args:
        config: the model's shape.
        samples: calibration sequences.
        context: tokens of each.
        batch: sequences in one forward.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_size
    llama = isinstance(config, LlamaConfig)
    attention = hidden * (2 * heads + 2 * config.key_value_heads * config.head_size)
    block = attention + hidden * inner * (3 if llama else 2)
    norm_fed = hidden * max(
        heads + 2 * config.key_value_heads * config.head_size, inner * (2 if llama else 1)
    )
    states = samples * context * hidden
    hessians = 2 * hidden**2 + heads**2 + inner**2
    forward = batch * context * (4 * hidden + 3 * inner)
    solving = 3 * inner**2 + 6 * hidden * inner
    learning = 10 * norm_fed
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    binarizing = states + 2 * block + hessians + max(forward, solving, learning)
    return _FLOAT * max(embeddings + states, binarizing)
