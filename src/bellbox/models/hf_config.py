"""The `config.json` of a Hugging Face folder, read as a configuration of our models and written from one.

Nothing is guessed: a folder that asks for something that these models do not compute (scaled rotary positions,
attention biases, another activation function) is refused, because loading it anyway would give a model that is almost
right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from bellbox.errors import BellboxError
from bellbox.models.config import GPTConfig, LlamaConfig, ModelConfig
from bellbox.utils import files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BellboxError: missing, too large, not JSON, or not an object.
    """
    if not path.exists():
        raise BellboxError(f"{path} does not exist; a Hugging Face model folder has one")
    return files.read_json(path)


def read_config(path: Path) -> tuple[ModelConfig, str]:
    """The shape that a `config.json` describes, and its model_type.

    Raises:
        BellboxError: no such file, another architecture, an option that these models do not compute.
    """
    values = read_json(path)
    return config_of(path, values), values["model_type"]


def config_of(path: Path, values: dict[str, Any]) -> ModelConfig:
    """The shape that the content of a `config.json` describes; errors as of `read_config`, which name `path`."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        known = ", ".join(map(repr, _READERS))
        raise BellboxError(f"{path}: model_type is {kind!r}; Bellbox reads {known}")
    quantized = values.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") == "bellbox":
        raise BellboxError(f"{path}: is of a packed Bellbox model; open its folder with bellbox.load")
    _refuse_unless(path, values, "quantization_config", None)
    try:
        return _READERS[kind](path, values)
    except KeyError as error:
        raise BellboxError(f"{path} has no {error.args[0]!r}, which a {kind} model needs") from error


def _refuse_unless(path: Path, values: dict[str, Any], key: str, *allowed: Any) -> None:
    """An absent key means the first allowed value, which is also transformers' default."""
    if values.get(key, allowed[0]) not in allowed:
        choices = " or ".join(json.dumps(choice) for choice in allowed)
        raise BellboxError(
            f"{path}: {key} is {json.dumps(values[key])}, which is not supported; only {choices} is"
        )


def _read_llama(path: Path, values: dict[str, Any]) -> LlamaConfig:
    _refuse_unless(path, values, "hidden_act", "silu", "swish")
    _refuse_unless(path, values, "attention_bias", False)
    _refuse_unless(path, values, "mlp_bias", False)
    theta = values.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise BellboxError(f"{path}: {key} is {json.dumps(rope)}, not an object")
        if rope.get("rope_type", rope.get("type", "default")) != "default" or (
            rope.get("partial_rotary_factor", 1.0) != 1.0
        ):
            raise BellboxError(
                f"{path}: {key} {json.dumps(rope)} is not supported; only plain rotary positions are"
            )
        theta = rope.get("rope_theta", theta)
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values.get("num_key_value_heads"),
        head_dim=values.get("head_dim"),
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        initializer_range=values.get("initializer_range", 0.02),
    )


_GPT_ACTIVATIONS: dict[str, Literal["gelu", "gelu_erf", "relu"]] = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_erf",
    "relu": "relu",
}
"""Transformers' names, its default first, and ours."""


def _read_gpt2(path: Path, values: dict[str, Any]) -> GPTConfig:
    _refuse_unless(path, values, "activation_function", *_GPT_ACTIVATIONS)
    _refuse_unless(path, values, "scale_attn_weights", True)
    _refuse_unless(path, values, "scale_attn_by_inverse_layer_idx", False)
    _refuse_unless(path, values, "add_cross_attention", False)
    width, inner = values["n_embd"], values.get("n_inner")
    if inner is None:
        inner = 4 * width if isinstance(width, int) else width
    return GPTConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=values["n_layer"],
        num_attention_heads=values["n_head"],
        max_position_embeddings=values.get("n_positions", 1024),
        layer_norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        initializer_range=values.get("initializer_range", 0.02),
        activation=_GPT_ACTIVATIONS[values.get("activation_function", "gelu_new")],
    )


def _read_opt(path: Path, values: dict[str, Any]) -> GPTConfig:
    """OPT (arXiv 2205.01068) is a GPT-2 with ReLU; its other differences are of names only."""
    if values.get("do_layer_norm_before", True) is not True:
        raise BellboxError(
            f"{path}: do_layer_norm_before is false: no norm stands before this model's layers (as in OPT-350m), "
            "which is not supported; the other sizes of OPT have them"
        )
    _refuse_unless(path, values, "activation_function", "relu")
    _refuse_unless(path, values, "enable_bias", True)
    _refuse_unless(path, values, "layer_norm_elementwise_affine", True)
    _refuse_unless(path, values, "_remove_final_layer_norm", False)
    width = values["hidden_size"]
    _refuse_unless(path, values, "word_embed_proj_dim", width)
    return GPTConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=values["ffn_dim"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        initializer_range=values.get("init_std", 0.02),
        activation="relu",
    )


_READERS: dict[str, Callable[[Path, dict[str, Any]], ModelConfig]] = {
    "llama": _read_llama,
    "gpt2": _read_gpt2,
    "opt": _read_opt,
}


def write_config(config: ModelConfig, dtype: str, kind: str | None = None) -> dict[str, Any]:
    """What `transformers` wants in a config.json of a LLaMA or GPT-2 whose weights have this dtype.

    Args:
        config: of the model.
        dtype: such as `float32`.
        kind: the model_type; where None that of the model. A GPT with ReLU may also be `opt`.
    """
    common = {
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
    }
    if isinstance(config, LlamaConfig):
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.key_value_heads,
            "head_dim": config.head_size,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,  # transformers 4
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        }
    if kind == "opt":
        return common | {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "hidden_size": config.hidden_size,
            "word_embed_proj_dim": config.hidden_size,
            "ffn_dim": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "init_std": config.initializer_range,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
            "pad_token_id": None,
        }
    return common | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": next(
            theirs for theirs, ours in _GPT_ACTIVATIONS.items() if ours == config.activation
        ),
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
