"""What a step of training takes on a cluster: bytes of memory, seconds of arithmetic and of communication.

The model, all of it:

- *Products*: 6 operations a multiplied parameter and token, 12 L T d for attention, at `EFFICIENCY` of the data
  sheet's rate.
- *Quantizers* read and write memory and multiply little. Their time is a number of passes over the tensor: how many was
  measured on a CPU (`benchmarks/scaling.py`), and a pass takes on a GPU what its memory's bandwidth says.
- *Optimizer*: AdamW reads weight, gradient and moments and writes three of them, 28 bytes a parameter, each rank its
  share.
- *Memory*: fp32 weights, gradients and two moments, 16 bytes a parameter over the ranks that share them; of the largest
  block what is gathered, twice; activations as autograd keeps them, counted in fp32 on the meta device.
- *Communication*: rings. `ddp` adds up gradients once a step; `fsdp` gathers weights in bf16 for forward and backward
  and scatters gradients in fp32, in each pass; `hybrid` does so within a node, and adds up shares over nodes once a
  step.
- *Overlap*: what is gathered in a pass hides behind the products of that pass, what is added up behind the last
  backward.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from bellbox.convert import prepare
from bellbox.errors import BellboxError
from bellbox.models import LlamaConfig, build, preset
from bellbox.recipe import Recipe
from bellbox.scaling.hardware import Cluster
from bellbox.utils.memory import Saved
from bellbox.utils.skeleton import on_meta

Scheme = Literal["ddp", "fsdp", "hybrid"]

EFFICIENCY = 0.4
"""Of the data sheet's rate of products: Llama 3 405B reached 38 to 43 % (arXiv 2407.21783, table 4). Smaller widths
reach less."""
WEIGHT_PASSES = 46.0
"""Readings of a weight in fp32 that its quantizer takes in forward and backward, on torch operations alone as on a GPU:
45 to 48 (`benchmarks/scaling.py --passes`, AMD EPYC, Zen 3, 2026-11-30). Where arithmetic takes longer than memory, as
on a CPU, this is too many."""
ACTIVATION_PASSES = 86.0
"""Likewise of an input: 83 to 89."""
_FP32, _BF16 = 4, 2
_STATES = 16
_OPTIMIZER = 28

# Sizes beyond Bellbox's presets, as published: TinyLlama (arXiv 2401.02385, without grouped heads), OpenLLaMA 3B, LLaMA
# 7B (arXiv 2302.13971).
LARGER = {
    "1B": LlamaConfig(32000, 2048, 5632, 22, 32, max_position_embeddings=2048),
    "3B": LlamaConfig(32000, 3200, 8640, 26, 32, max_position_embeddings=2048),
    "7B": LlamaConfig(32000, 4096, 11008, 32, 32, max_position_embeddings=2048),
}


def shape_of(name: str) -> LlamaConfig:
    """The shape of a size.

    Raises:
        BellboxError: no such size, or none of a LLaMA.
    """
    config = LARGER.get(name) or preset(name)
    if not isinstance(config, LlamaConfig):
        raise BellboxError(f"{name}: costs are known of LLaMA's shape alone; take 95M to 7B")
    return config


@dataclass(frozen=True)
class Network:
    """Counts of a LLaMA with quantized linear layers."""

    shape: LlamaConfig

    @property
    def block(self) -> int:
        """Quantized parameters of one block."""
        width, inner = self.shape.hidden_size, self.shape.intermediate_size
        heads = self.shape.num_attention_heads
        kv = self.shape.num_key_value_heads or heads
        return 2 * width * width + 2 * width * width * kv // heads + 3 * width * inner

    @property
    def quantized(self) -> int:
        """Of all blocks."""
        return self.shape.num_hidden_layers * self.block

    @property
    def parameters(self) -> int:
        """All of them: blocks, norms, embedding and head."""
        width, layers = self.shape.hidden_size, self.shape.num_hidden_layers
        tables = 1 if self.shape.tie_word_embeddings else 2
        return self.quantized + (2 * layers + 1) * width + tables * self.shape.vocab_size * width

    def operations(self, context: int) -> float:
        """Additions and multiplications of a token, forward and backward, products and attention."""
        head = self.shape.vocab_size * self.shape.hidden_size
        attention = 12 * self.shape.num_hidden_layers * context * self.shape.hidden_size
        return 6.0 * (self.quantized + head) + attention

    @property
    def inputs(self) -> int:
        """Numbers a token that quantizers of inputs see: one for q, k and v, one for gate and up."""
        width, inner = self.shape.hidden_size, self.shape.intermediate_size
        return self.shape.num_hidden_layers * (3 * width + inner)

    def activations(self, tokens: int, context: int, *, checkpointed: bool) -> float:
        """Bytes that a pass over so many tokens keeps for its backward, in fp32.

        Args:
            tokens: of the pass.
            context: tokens a sequence.
            checkpointed: whether blocks keep their input alone, and are computed again one by one.
        """
        block, rest = _kept_a_token(self.shape, context)
        layers = self.shape.num_hidden_layers
        if checkpointed:
            return tokens * (layers * _FP32 * self.shape.hidden_size + block + rest)
        return tokens * (layers * block + rest)


@functools.cache
def _kept_a_token(shape: LlamaConfig, context: int) -> tuple[float, float]:
    """Bytes a token that one block keeps, and all else, the head's gradients included: counted on the meta device."""
    from dataclasses import replace

    from torch.nn import functional as F

    found: list[float] = []
    for layers in (1, 2):
        with on_meta():
            config = replace(shape, num_hidden_layers=layers, max_position_embeddings=context)
            model = build(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(model, Recipe.bbq(bits=2))
        own = (*model.parameters(), *model.buffers())
        with torch.device("meta"), _Attention(), Saved(own) as saved:
            logits = model.train()(torch.empty((1, context), dtype=torch.int64)).flatten(0, 1)
            F.cross_entropy(logits, torch.empty(context, dtype=torch.int64))
        found.append((saved.nbytes + 2 * logits.numel() * _FP32) / context)
    # What is kept of the weights does not grow with the tokens, but is small beside them at these lengths.
    return found[1] - found[0], 2 * found[0] - found[1]


class _Attention(torch.overrides.TorchFunctionMode):
    """Gives attention the fused form, which the meta device has not: it keeps no matrix of scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(*args[:3], 0.0, True)[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """One optimizer step, foreseen."""

    passes: int
    """Forward and backward passes of each rank."""
    micro_sequences: int
    """Sequences in one pass of a rank."""
    checkpointed: bool
    """Whether activations have to be computed again to fit."""
    memory: float
    """Bytes of a GPU at the fullest."""
    products: float
    """Seconds of matrix products and attention."""
    quantizers: float
    """Seconds of quantizers."""
    optimizer: float
    """Seconds of the optimizer."""
    communication: float
    """Seconds of collective operations, hidden ones included."""
    exposed: float
    """Seconds of them that nothing hides."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.products + self.quantizers + self.optimizer + self.exposed


def step_of(
    network: Network,
    cluster: Cluster,
    *,
    batch_tokens: int,
    context: int,
    scheme: Scheme = "fsdp",
    efficiency: float = EFFICIENCY,
) -> Step | None:
    """Foresee a step with the most sequences a pass that fit; None where not even one fits.

    Args:
        network: to train.
        cluster: to train on.
        batch_tokens: tokens of a step over all GPUs.
        context: tokens a sequence.
        scheme: what is shared among whom.
        efficiency: of the products.

    Raises:
        BellboxError: a batch that does not divide among the GPUs.
    """
    if context < 1 or batch_tokens < 1 or batch_tokens % (context * cluster.gpus):
        raise BellboxError(
            f"{batch_tokens:,} tokens a step are no whole number of sequences of {context:,} on each of {cluster.gpus} "
            f"GPUs; take a multiple of {context * cluster.gpus:,}"
        )
    sequences = batch_tokens // context // cluster.gpus
    sizes = [size for size in range(sequences, 0, -1) if sequences % size == 0]
    for checkpointed in (False, True):
        for size in sizes:
            held = _memory(network, cluster, scheme, size * context, context, checkpointed)
            if held <= 0.9 * cluster.gpu.memory:  # the rest is the allocator's, and the libraries'
                return _timed(
                    network, cluster, scheme, sequences, size, context, checkpointed, held, efficiency
                )
    return None


def _sharers(cluster: Cluster, scheme: Scheme) -> int:
    """Ranks that share one copy of weights, gradients and moments."""
    return {"ddp": 1, "fsdp": cluster.gpus, "hybrid": min(cluster.gpus, cluster.a_node)}[scheme]


def _memory(
    network: Network, cluster: Cluster, scheme: Scheme, tokens: int, context: int, checkpointed: bool
) -> float:
    states = _STATES * network.parameters / _sharers(cluster, scheme)
    largest = max(network.block, network.shape.vocab_size * network.shape.hidden_size)
    gathered = 0 if scheme == "ddp" else 2 * (_BF16 + _FP32) * largest
    # Fake-quantized weights of a block, and their gradients, live while it is computed.
    coded = 2 * _FP32 * network.block
    return states + gathered + coded + network.activations(tokens, context, checkpointed=checkpointed)


def _timed(
    network: Network,
    cluster: Cluster,
    scheme: Scheme,
    sequences: int,
    size: int,
    context: int,
    checkpointed: bool,
    held: float,
    efficiency: float,
) -> Step:
    gpu, passes, tokens = cluster.gpu, sequences // size, sequences * context
    again = 4 / 3 if checkpointed else 1.0  # a second forward
    products = again * network.operations(context) * tokens / (efficiency * gpu.products)
    read = WEIGHT_PASSES * network.quantized * passes + ACTIVATION_PASSES * network.inputs * tokens
    quantizers = again * read * _FP32 / gpu.bandwidth
    optimizer = _OPTIMIZER * network.parameters / _sharers(cluster, scheme) / gpu.bandwidth
    computed = (products + quantizers) / passes
    if scheme == "ddp":
        added = cluster.reduce(_FP32 * network.parameters)
        total, exposed = added, max(0.0, added - computed * 2 / 3)
    else:
        ranks = _sharers(cluster, scheme)
        one = 2 * cluster.gather(_BF16 * network.parameters, ranks)
        one += cluster.gather(_FP32 * network.parameters, ranks)
        total, exposed = passes * one, passes * max(0.0, one - computed)
        if scheme == "hybrid" and cluster.nodes > 1:
            n = cluster.nodes
            share = _FP32 * network.parameters / ranks
            added = 2 * (n - 1) / n * share / gpu.network
            total, exposed = total + added, exposed + max(0.0, added - computed * 2 / 3)
    return Step(passes, size, checkpointed, held, products, quantizers, optimizer, total, exposed)
