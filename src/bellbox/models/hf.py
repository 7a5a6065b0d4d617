"""To and from Hugging Face folders, `config.json` with `model.safetensors`, without `transformers`.

The folder is the exchange format of the field, and reading it needs only JSON and safetensors. LLaMA's
tensors map by name; GPT-2's fused, transposed matrices are split on the way in and fused on the way out.
Nothing is guessed: a folder that asks for something that these models do not compute (scaled rotary
positions, attention biases, another activation function) is refused, because loading it anyway would give a
model that is almost right.

A file is somebody else's: names of shards may not leave the folder, every tensor's name, shape and type is
checked against the configuration before it is read, and no file is ever executed or unpickled.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.models.config import GPTConfig, LlamaConfig, ModelConfig
from bellbox.models.gpt import GPT
from bellbox.models.llama import Llama

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Buffers that older versions of transformers wrote beside the weights; they follow from the configuration.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


def load_hf(folder: str | os.PathLike[str]) -> Llama | GPT:
    """Read a LLaMA or GPT-2 that `transformers` (or `save_hf`) wrote, in one file or in shards.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Returns:
        the model on the CPU, in evaluation mode, in fp32: bf16 and fp16 weights are widened, which is exact.

    Raises:
        BellboxError: a missing or broken file, another architecture, an option that is not supported, a
            missing, unknown, misshapen or oddly typed tensor.
    """
    root = Path(folder)
    config = _read_config(root / "config.json")
    with torch.device("meta"):
        model = _new(config)
    expected = {name: tuple(tensor.shape) for name, tensor in _to_hf(model.state_dict(), config).items()}
    state = _from_hf(_read_tensors(root, expected, config), config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[_embedding(config)]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if isinstance(model, Llama):
        model.model.rotary_emb.to_empty(device="cpu")  # which fills it
    return model.eval()


def save_hf(model: Llama | GPT, folder: str | os.PathLike[str]) -> None:
    """Write a folder that `transformers` loads as LlamaForCausalLM or GPT2LMHeadModel; weights keep their
    dtype.

    The tokens that begin and end a text are the tokenizer's to say; config.json leaves them null.

    Args:
        model: with plain float layers; a quantized one has its own format (`bellbox.save`).
        folder: made if missing; files of these names in it are replaced, each in one step.

    Raises:
        BellboxError: a model that is no Llama or GPT, or whose layers are quantized.
    """
    if not isinstance(model, Llama | GPT):
        raise BellboxError(f"save_hf writes Llama and GPT models, not {type(model).__name__}")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        plain = _new(model.config).state_dict()
    odd = sorted(set(state) ^ set(plain))
    if odd:
        raise BellboxError(
            f"save_hf writes plain float models, and {odd[0]!r} is not as in one; "
            "save a quantized model with bellbox.save"
        )
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _to_hf(state, model.config).items()}
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    dtype = str(state[_embedding(model.config)].dtype).removeprefix("torch.")
    part = root / f".{_WEIGHTS}.{os.getpid()}.part"
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, root / _WEIGHTS)
        part.write_text(json.dumps(_write_config(model.config, dtype), indent=2) + "\n", encoding="utf-8")
        os.replace(part, root / "config.json")
    finally:
        part.unlink(missing_ok=True)


def _new(config: ModelConfig) -> Llama | GPT:
    return Llama(config) if isinstance(config, LlamaConfig) else GPT(config)


def _embedding(config: ModelConfig) -> str:
    return "model.embed_tokens.weight" if isinstance(config, LlamaConfig) else "transformer.wte.weight"


# --- names and layout ---


def _transposed(name: str) -> bool:
    """GPT-2 stores these matrices as [in, out]."""
    return name.endswith((".c_proj.weight", ".c_fc.weight"))


def _to_hf(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names and layout; a tied head is left out."""
    result = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if isinstance(config, LlamaConfig) or not re.search(r"\.[kqv]_proj\.", name):
            result[name] = tensor.t() if isinstance(config, GPTConfig) and _transposed(name) else tensor
        elif ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            fused = torch.cat(parts)
            result[name.replace("q_proj", "c_attn")] = fused.t() if fused.dim() == 2 else fused
    return result


def _from_hf(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The way back from `_to_hf`, every tensor in memory of its own."""
    if isinstance(config, LlamaConfig):
        return tensors
    result = {}
    for name, tensor in tensors.items():
        if ".c_attn." in name:
            whole = tensor.t() if tensor.dim() == 2 else tensor
            for part, piece in zip("qkv", whole.chunk(3), strict=True):
                result[name.replace("c_attn", f"{part}_proj")] = piece.clone(
                    memory_format=torch.contiguous_format
                )
        else:
            result[name] = tensor.t().contiguous() if _transposed(name) else tensor
    return result


# --- config.json ---


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BellboxError(f"{path} does not exist; a Hugging Face model folder has one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BellboxError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BellboxError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _read_config(path: Path) -> ModelConfig:
    values = _read_json(path)
    kind = values.get("model_type")
    if kind not in ("llama", "gpt2"):
        raise BellboxError(f"{path}: model_type is {kind!r}; Bellbox reads 'llama' and 'gpt2'")
    _refuse_unless(path, values, "quantization_config", None)
    try:
        return _read_llama(path, values) if kind == "llama" else _read_gpt2(path, values)
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


def _read_gpt2(path: Path, values: dict[str, Any]) -> GPTConfig:
    _refuse_unless(path, values, "activation_function", "gelu_new", "gelu_pytorch_tanh")
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
    )


def _write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
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
    return common | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
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


# --- tensors ---


def _files(root: Path) -> dict[Path, set[str] | None]:
    """The weight files, and the tensors that the index says are in each (None: all that it holds)."""
    if (root / _WEIGHTS).is_file():
        return {root / _WEIGHTS: None}
    if not (root / _INDEX).is_file():
        raise BellboxError(f"{root} holds neither {_WEIGHTS} nor {_INDEX}")
    weight_map = _read_json(root / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BellboxError(f"{root / _INDEX} has no weight_map")
    files: dict[Path, set[str] | None] = {}
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard)
        if not plain:
            raise BellboxError(
                f"{root / _INDEX}: {shard!r} is not the name of a .safetensors file in the folder"
            )
        shards.setdefault(shard, set()).add(name)
    for shard, names in shards.items():
        files[root / shard] = names
    return files


def _read_tensors(root: Path, expected: dict[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Tensor]:
    """Exactly the expected tensors, in fp32 and in memory of their own (a safetensors view maps the file)."""
    tensors: dict[str, Tensor] = {}
    spare_head: Tensor | None = None
    for path, listed in _files(root).items():
        try:
            with safe_open(path, framework="pt") as file:
                present = set(file.keys())
                absent = sorted((listed or set()) - present)
                if absent:
                    raise BellboxError(f"{path} has no tensor {absent[0]!r}, which {_INDEX} says it holds")
                for stored in sorted(present if listed is None else listed):
                    if _DERIVED.search(stored):
                        continue
                    name = stored
                    if isinstance(config, GPTConfig) and not stored.startswith(("transformer.", "lm_head.")):
                        name = f"transformer.{stored}"  # GPT-2's first checkpoints name the body alone
                    head = name == "lm_head.weight" and config.tie_word_embeddings
                    shape = expected.get(_embedding(config) if head else name)
                    if shape is None:
                        raise BellboxError(f"{path}: tensor {stored!r} has no place in this model")
                    view = file.get_slice(stored)
                    if tuple(view.get_shape()) != shape:
                        raise BellboxError(
                            f"{path}: {stored!r} has shape {list(view.get_shape())}, but config.json asks "
                            f"for {list(shape)}"
                        )
                    if view.get_dtype() not in _DTYPES:
                        raise BellboxError(
                            f"{path}: {stored!r} is of type {view.get_dtype()}; "
                            f"Bellbox reads {', '.join(_DTYPES)}"
                        )
                    tensor = file.get_tensor(stored).to(torch.float32, copy=True)
                    if head:
                        spare_head = tensor
                    else:
                        tensors[name] = tensor
        except (SafetensorError, OSError) as error:
            raise BellboxError(f"{path} cannot be read as safetensors: {error}") from error
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise BellboxError(f"{root} has no tensor {missing[0]!r} ({len(missing)} missing in all)")
    if spare_head is not None and not torch.equal(spare_head, tensors[_embedding(config)]):
        raise BellboxError(
            f"{root}: tie_word_embeddings is true, but lm_head.weight differs from the embedding"
        )
    return tensors
