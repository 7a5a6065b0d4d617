"""Model configurations as values: frozen dataclasses and a table of named sizes.

A checkpoint, a run's YAML file and a packed folder all have to say which model they hold, so the description
is plain data that goes to JSON and back without loss. The field names are those of Hugging Face's Llama, for
all transformers, so that nobody learns two vocabularies. Anything impossible (heads that do not divide, an unknown
key) is refused here, with one line, before a tensor is allocated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from sys import float_info
from typing import Any, ClassVar, Literal

from bellbox.errors import BellboxError

_POSITIVE_INTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_labels",
    "num_channels",
    "image_size",
    "patch_size",
    "width",
    "stages",
    "blocks",
    "stem_stride",
    "stem_kernel",
)
# Far beyond any model, and low enough that a spoilt file cannot make a loader build layers for hours.
_MOST = {
    "num_hidden_layers": 1024, "max_position_embeddings": 2**20, "num_channels": 256, "image_size": 4096,
    "patch_size": 256, "width": 8192, "stages": 8, "blocks": 256, "stem_stride": 8,
    "stem_kernel": 15,
}  # fmt: skip
# cos and sin of every position, half a head wide each, stand in memory and in no file: half a GiB at this product.
_MOST_ROTARY = 2**27
_BOOLS = ("tie_word_embeddings", "fused_qkv", "bias", "max_pool", "class_token")
_POSITIVE_FLOATS = ("rms_norm_eps", "layer_norm_epsilon", "rope_theta", "initializer_range")


class _Config:
    """What both descriptions share: checks of single values, and the way to a dictionary."""

    architecture: ClassVar[str]
    optional: ClassVar[tuple[str, ...]] = ("num_key_value_heads", "head_dim")
    """Fields that may be None."""
    later: ClassVar[dict[str, Any]] = {}
    """Fields that came later, with their defaults."""

    def _check_values(self) -> None:
        for name, value in vars(self).items():
            optional = value is None and name in self.optional
            if name in _POSITIVE_INTS and not optional:
                most = _MOST.get(name, 2**24)
                if type(value) is not int or not 1 <= value <= most:
                    raise BellboxError(f"{name} is {value!r}; it must be a whole number from 1 to {most}")
            elif name in _POSITIVE_FLOATS:
                if (
                    isinstance(value, bool)
                    or not isinstance(value, int | float)
                    or not 0 < value <= float_info.max
                ):
                    raise BellboxError(f"{name} is {value!r}; it must be a finite number above 0")
            elif name in _BOOLS and not isinstance(value, bool):
                raise BellboxError(f"{name} is {value!r}; it must be true or false")
            elif name == "drop_path" and (
                isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1
            ):
                raise BellboxError(f"drop_path is {value!r}; it must be a number in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, and "architecture"; `config_from_dict` is the way back.

        Fields that came later are left out at their defaults, so that files stay what they were.
        """
        values: dict[str, Any] = asdict(self)  # pyright: ignore[reportArgumentType]
        usual = {name for name, default in self.later.items() if values.get(name) == default}
        return {"architecture": self.architecture, **{k: v for k, v in values.items() if k not in usual}}


@dataclass(frozen=True)
class LlamaConfig(_Config):
    """The shape of a LLaMA: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases.

    Raises:
        BellboxError: a size that is no positive whole number, heads that do not fit together, or rotary tables
            beyond 2^27 numbers.
    """

    architecture: ClassVar[str] = "llama"
    later: ClassVar[dict[str, Any]] = {"fused_qkv": False}

    vocab_size: int = 32000
    """Entries of the tokenizer; rows of the embedding and of the head."""
    hidden_size: int = 640
    """Width of the residual stream."""
    intermediate_size: int = 1792
    """Width inside the SwiGLU MLP."""
    num_hidden_layers: int = 6
    """Transformer blocks."""
    num_attention_heads: int = 5
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads, a divisor of the query heads; as many as those where None."""
    head_dim: int | None = None
    """Width of one head, even; hidden_size / num_attention_heads where None."""
    max_position_embeddings: int = 512
    """The context: the longest sequence, in tokens."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding matrix itself."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 x layers)."""
    fused_qkv: bool = False
    """Whether queries, keys and values are rows of one matrix, as in the BBQ authors' code: one scale of a weight's
    quantizer for all three. Needs as many key and value heads as query heads."""

    def __post_init__(self) -> None:
        self._check_values()
        if self.fused_qkv and self.key_value_heads != self.num_attention_heads:
            raise BellboxError(
                f"fused_qkv needs as many key and value heads as query heads, not {self.key_value_heads} and "
                f"{self.num_attention_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise BellboxError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them or give head_dim"
            )
        if self.head_size % 2:
            raise BellboxError(f"head_dim is {self.head_size}; rotary positions need an even one")
        if self.max_position_embeddings * self.head_size > _MOST_ROTARY:
            raise BellboxError(
                f"max_position_embeddings {self.max_position_embeddings} times head_dim {self.head_size} is above "
                f"{_MOST_ROTARY}, the largest table of rotary positions; lower one of them"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise BellboxError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.key_value_heads}"
            )

    @property
    def head_size(self) -> int:
        """Width of one head, worked out where `head_dim` is None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Key and value heads, worked out where `num_key_value_heads` is None."""
        return self.num_key_value_heads or self.num_attention_heads


@dataclass(frozen=True)
class GPTConfig(_Config):
    """The shape of a GPT-2 or an OPT: LayerNorm before each part, learned positions, tanh GELU or ReLU, biases.

    Raises:
        BellboxError: a size that is no positive whole number, heads that do not divide it, an unknown activation.
    """

    architecture: ClassVar[str] = "gpt"
    later: ClassVar[dict[str, Any]] = {"activation": "gelu", "fused_qkv": False, "bias": True}

    vocab_size: int = 32000
    """Entries of the tokenizer; rows of the embedding and of the head."""
    hidden_size: int = 640
    """Width of the residual stream (GPT-2 calls it n_embd)."""
    intermediate_size: int = 2560
    """Width inside the MLP (n_inner)."""
    num_hidden_layers: int = 6
    """Transformer blocks (n_layer)."""
    num_attention_heads: int = 5
    """Heads (n_head)."""
    max_position_embeddings: int = 512
    """The context: the longest sequence, in tokens (n_positions)."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance inside LayerNorm."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding matrix itself."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 x layers)."""
    activation: Literal["gelu", "gelu_erf", "relu"] = "gelu"
    """Inside the MLP: GPT-2's tanh GELU, the exact GELU, or OPT's ReLU."""
    fused_qkv: bool = False
    """Whether queries, keys and values are rows of one matrix."""
    bias: bool = True
    """Whether linear layers and norms have biases."""

    def __post_init__(self) -> None:
        self._check_values()
        if self.activation not in ("gelu", "gelu_erf", "relu"):
            raise BellboxError(f"activation is {self.activation!r}; it must be 'gelu', 'gelu_erf' or 'relu'")
        if self.hidden_size % self.num_attention_heads:
            raise BellboxError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Key and value heads: as many as query heads."""
        return self.num_attention_heads


@dataclass(frozen=True)
class ResNetConfig(_Config):
    """The shape of a ResNet of basic blocks: each stage half as large and twice as wide as the one before.

    The stem is CIFAR's, 3 x 3, or ImageNet's, 7 x 7 with stride 2 and a max pooling behind it.

    Raises:
        BellboxError: a size that is no positive whole number, or a stem kernel without a middle.
    """

    architecture: ClassVar[str] = "resnet"
    optional: ClassVar[tuple[str, ...]] = ("image_size",)
    later: ClassVar[dict[str, Any]] = {"stem_kernel": 3, "max_pool": False}

    num_labels: int = 10
    """Classes."""
    num_channels: int = 3
    """Channels of an image."""
    width: int = 32
    """Channels of the first stage; a power of two suits the rotation."""
    stages: int = 3
    blocks: int = 1
    """Of each stage, two convolutions each."""
    stem_stride: int = 1
    """2 halves the image at once: four times as quick."""
    stem_kernel: int = 3
    """Height and width of the stem's filters, odd."""
    max_pool: bool = False
    """Whether the largest of each 3 x 3 pixels, every second one, goes on behind the stem."""
    drop_path: float = 0.0
    """Probability that a sample skips the last block in training; it rises from 0 block by block."""
    image_size: int | None = None
    """Height and width that the images it was trained on were scaled to; None where they came in one size. It takes
    any."""

    def __post_init__(self) -> None:
        self._check_values()
        if self.stem_kernel % 2 == 0:
            raise BellboxError(f"stem_kernel is {self.stem_kernel}; it must be odd, such as 3 or 7")


@dataclass(frozen=True)
class ViTConfig(_Config):
    """The shape of a vision transformer: learned positions, GELU, mean over the patches or a class token.

    Raises:
        BellboxError: a size that is no positive whole number, heads or patches that do not divide.
    """

    architecture: ClassVar[str] = "vit"
    later: ClassVar[dict[str, Any]] = {"class_token": False, "fused_qkv": False}

    num_labels: int = 10
    """Classes."""
    num_channels: int = 3
    """Channels of an image."""
    image_size: int = 32
    """Height and width of an image."""
    patch_size: int = 4
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 256
    """Width inside the MLP."""
    num_hidden_layers: int = 4
    """Transformer blocks."""
    num_attention_heads: int = 4
    layer_norm_epsilon: float = 1e-6
    """Added to the variance inside LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    drop_path: float = 0.0
    """Probability that a sample skips the last block in training; it rises from 0 block by block."""
    class_token: bool = False
    """Whether the classifier sees a learned token before the patches, as in DeiT, in place of their mean."""
    fused_qkv: bool = False
    """Whether queries, keys and values are rows of one matrix."""

    def __post_init__(self) -> None:
        self._check_values()
        for name, whole, part in (
            ("num_attention_heads", self.hidden_size, self.num_attention_heads),
            ("patch_size", self.image_size, self.patch_size),
        ):
            if whole % part:
                raise BellboxError(f"{name} is {part}, which does not divide {whole}")


ModelConfig = LlamaConfig | GPTConfig
"""A description of a language model."""
VisionConfig = ResNetConfig | ViTConfig
"""A description of a vision model."""
AnyConfig = ModelConfig | VisionConfig

LANGUAGE_ARCHITECTURES = {kind.architecture: kind for kind in (LlamaConfig, GPTConfig)}
VISION_ARCHITECTURES = {kind.architecture: kind for kind in (ResNetConfig, ViTConfig)}


PAPER_VOCABULARY = 50_304
"""Rows of the embedding and of the head in the BBQ paper's runs: with them its models have the sizes of their names."""


def _llama(layers: int, width: int, heads: int, swiglu: int) -> LlamaConfig:
    return LlamaConfig(PAPER_VOCABULARY, width, swiglu, layers, heads)


# 95M to 300M are the paper's (its table of models): 94.9, 126.8, 205.8 and 332.0 million parameters. tiny and small are
# ours, for a laptop and for tests, with a vocabulary that a small corpus can fill. In a run it follows the tokenizer.
PRESETS: dict[str, ModelConfig] = {
    "tiny": LlamaConfig(4096, 256, 640, 2, 4, max_position_embeddings=256),
    "small": LlamaConfig(4096, 256, 640, 4, 4, max_position_embeddings=512),
    "95M": _llama(6, 640, 5, 1792),
    "125M": _llama(7, 768, 6, 2048),
    "200M": _llama(8, 1024, 8, 2816),
    "300M": _llama(10, 1280, 10, 3584),
    "gpt-tiny": GPTConfig(4096, 256, 1024, 2, 4, max_position_embeddings=256),
    "gpt-95M": GPTConfig(PAPER_VOCABULARY, activation="gelu_erf", bias=False),
}


def _imagenet_resnet(blocks: int) -> ResNetConfig:
    return ResNetConfig(1000, width=64, stages=4, blocks=blocks, stem_stride=2, stem_kernel=7, max_pool=True)


def _deit(width: int, heads: int) -> ViTConfig:
    return ViTConfig(
        1000, image_size=224, patch_size=16, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12,
        num_attention_heads=heads, class_token=True, fused_qkv=True,
    )  # fmt: skip


# resnet-small and vit-small see an epoch of CIFAR-10 in minutes on one core; resnet-20 is the usual size. The others
# are ImageNet's (He et al. 2015, arXiv 1512.03385, table 1; Touvron et al. 2020, arXiv 2012.12877, table 1).
VISION_PRESETS: dict[str, VisionConfig] = {
    "resnet-small": ResNetConfig(stem_stride=2),
    "resnet-20": ResNetConfig(width=16, blocks=3),
    "vit-small": ViTConfig(),
    "resnet-10": _imagenet_resnet(blocks=1),
    "resnet-18": _imagenet_resnet(blocks=2),
    "deit-tiny": _deit(width=192, heads=3),
    "deit-small": _deit(width=384, heads=6),
}


def _known_fields(cls: type[AnyConfig], values: dict[str, Any], what: str) -> None:
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise BellboxError(f"{what} has no field {unknown[0]!r}; there are: {', '.join(known)}")


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The named size of a language model, with any field replaced.

    Args:
        name: a key of `PRESETS`.
        **overrides: fields of the configuration, e.g. `vocab_size=2048`.

    Raises:
        BellboxError: no such preset or field, or an impossible shape.
    """
    return _preset(PRESETS, "model preset", name, overrides)


def vision_preset(name: str, **overrides: Any) -> VisionConfig:
    """The named size of a vision model, as `preset`; names are keys of `VISION_PRESETS`."""
    return _preset(VISION_PRESETS, "preset of a vision model", name, overrides)


def _preset(presets: dict[str, Any], what: str, name: str, overrides: dict[str, Any]) -> Any:
    if name not in presets:
        raise BellboxError(f"no {what} {name!r}; there are: {', '.join(presets)}")
    base = presets[name]
    _known_fields(type(base), overrides, f"model preset {name!r}")
    return type(base)(**{**asdict(base), **overrides})


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The configuration of a language model that `to_dict` wrote; fields left out take their defaults.

    Raises:
        BellboxError: unknown architecture or field, or an impossible shape.
    """
    return _from_dict(values, LANGUAGE_ARCHITECTURES)


def any_config_from_dict(values: dict[str, Any]) -> AnyConfig:
    """`config_from_dict` of a language or a vision model."""
    return _from_dict(values, {**LANGUAGE_ARCHITECTURES, **VISION_ARCHITECTURES})


def _from_dict(values: dict[str, Any], architectures: dict[str, Any]) -> Any:
    rest = dict(values)
    architecture = rest.pop("architecture", None)
    if not isinstance(architecture, str) or architecture not in architectures:
        known = ", ".join(architectures)
        raise BellboxError(f"model architecture is {architecture!r}; Bellbox knows: {known}")
    cls = architectures[architecture]
    _known_fields(cls, rest, f"a {architecture} configuration")
    return cls(**rest)
