"""The models of the zoo, tiny and at random, each with the layers that stay in full precision.

Names are written out: they are what a reader of each architecture would name as its ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from zoo_packages import package


@dataclass(frozen=True)
class Model:
    """One architecture."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    kept: frozenset[str]
    """Patterns of the names of the layers that are not quantized."""
    fast: bool = False
    """Whether `make test` has it; else only the whole zoo."""
    fails: str = ""
    """What is known not to hold yet."""
    exact: bool = True
    """Whether packed outputs are equal to the last bit; not where torch's own attention in floats is part of them."""

    def is_kept(self, layer: str) -> bool:
        """Whether a layer of this name is to stay in full precision."""
        return any(fnmatchcase(layer, pattern) for pattern in self.kept)


def ids(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": torch.arange(2, 18).reshape(2, 8), **more}


def image(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).sin().reshape(2, 3, size, size)
    }


def pixels(size: int = 64) -> Callable[[], torch.Tensor]:
    return lambda: torch.linspace(-9, 9, 2 * 3 * size * size).sin().reshape(2, 3, size, size)


DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 5,
}
PATCHES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def hf(
    kind: str,
    *kept: str,
    inputs: Callable[[], Any] | None = None,
    fast: bool = False,
    fails: str = "",
    exact: bool = True,
    **shape: Any,
) -> Model:
    """A model of transformers by the name of its class; every dropout off, so that one step is finite and quick."""

    def build() -> nn.Module:
        transformers = package("transformers")
        assert transformers is not None
        torch.manual_seed(0)
        made = getattr(transformers, kind)
        return made(made.config_class(**shape))

    return Model(kind, build, inputs or ids(), frozenset(kept), fast, fails, exact)


def tv(name: str, *kept: str, size: int = 64, fast: bool = False, **choices: Any) -> Model:
    """A network of torchvision."""

    def build() -> nn.Module:
        torchvision = package("torchvision")
        assert torchvision is not None
        torch.manual_seed(0)
        return torchvision.models.get_model(name, weights=None, **{"num_classes": 10, **choices})

    return Model(name, build, pixels(size), frozenset(kept), fast)


def ti(name: str, *kept: str, size: int = 64, fast: bool = False, fails: str = "", **choices: Any) -> Model:
    """A network of timm."""

    def build() -> nn.Module:
        timm = package("timm")
        assert timm is not None
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=10, **choices)

    return Model(name, build, pixels(size), frozenset(kept), fast, fails)


DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
SPEECH = {
    **DETR,
    **{"vocab_size": 96, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**TOWER, "vocab_size": 96, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
PAIR = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 32}
FOURS = {"hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5}

TRANSFORMERS = [
    hf("LlamaForCausalLM", "lm_head", fast=True, **DECODER),
    hf("MistralForCausalLM", "lm_head", **DECODER),
    hf("Qwen2ForCausalLM", "lm_head", **DECODER),
    hf("Qwen3ForCausalLM", "lm_head", **DECODER),
    hf("Gemma2ForCausalLM", "lm_head", **DECODER),
    hf("Gemma3ForCausalLM", "lm_head", sliding_window=16, **DECODER),
    hf("PhiForCausalLM", "lm_head", **{k: v for k, v in DECODER.items() if k != "head_dim"}),
    hf("Phi3ForCausalLM", "lm_head", **DECODER),
    hf("GPTNeoXForCausalLM", "lm_head", **ENCODER),
    hf(
        "OPTForCausalLM",
        "lm_head",
        ffn_dim=48,
        word_embed_proj_dim=32,
        **{k: v for k, v in DECODER.items() if k != "intermediate_size"},
    ),
    hf("BloomForCausalLM", "lm_head", vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    hf(
        "GPT2LMHeadModel",
        "lm_head",
        fast=True,
        **{"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    hf("MixtralForCausalLM", "lm_head", num_local_experts=4, **DECODER),
    hf(
        "Qwen3MoeForCausalLM",
        "lm_head",
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        **DECODER,
    ),
    hf(
        "Qwen2MoeForCausalLM",
        "lm_head",
        "model.layers.*.mlp.shared_expert_gate",
        fast=True,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        **DECODER,
    ),
    hf(
        "GptOssForCausalLM",
        "lm_head",
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **DECODER,
    ),
    hf("PhimoeForCausalLM", "lm_head", "model.layers.*.mlp.router", num_local_experts=4, **DECODER),
    hf(
        "MambaForCausalLM",
        "lm_head",
        "backbone.layers.*.mixer.dt_proj",  # its weight is read past the layer
        "backbone.layers.*.mixer.conv1d",  # likewise, by a step of decoding
        vocab_size=96,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
    ),
    hf("BertForQuestionAnswering", "qa_outputs", fast=True, **{**ENCODER, "num_labels": 2}),
    hf(
        "CamembertForQuestionAnswering",
        "qa_outputs",
        fast=True,
        **{**ENCODER, "max_position_embeddings": 40, "num_labels": 2},
    ),
    hf(
        "RobertaForSequenceClassification",
        "classifier.out_proj",
        fast=True,
        **{**ENCODER, "max_position_embeddings": 40},
    ),
    hf(
        "DistilBertForSequenceClassification",
        "classifier",
        vocab_size=96,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
    ),
    hf("ElectraForPreTraining", "discriminator_predictions.dense_prediction", embedding_size=16, **ENCODER),
    hf("DebertaV2ForSequenceClassification", "classifier", **ENCODER),
    hf("AlbertForSequenceClassification", "classifier", embedding_size=16, **ENCODER),
    hf("BertForPreTraining", "cls.predictions.decoder", "cls.seq_relationship", **ENCODER),
    hf(
        "T5ForConditionalGeneration",
        "lm_head",
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        inputs=ids(decoder_input_ids=torch.arange(3, 9).reshape(2, 3)),
    ),
    hf(
        "SwitchTransformersForConditionalGeneration",
        "lm_head",
        "encoder.block.1.layer.1.mlp.router.classifier",
        "decoder.block.1.layer.2.mlp.router.classifier",
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        decoder_start_token_id=0,
        inputs=ids(decoder_input_ids=torch.arange(3, 9).reshape(2, 3)),
    ),
    hf("BartForConditionalGeneration", "lm_head", max_position_embeddings=32, **SPEECH),
    hf(
        "WhisperForConditionalGeneration",
        "proj_out",
        "model.encoder.conv1",
        fast=True,
        max_source_positions=8,
        max_target_positions=8,
        num_mel_bins=4,
        inputs=lambda: {
            "input_features": torch.linspace(-3, 3, 2 * 4 * 16).sin().reshape(2, 4, 16),
            "decoder_input_ids": torch.arange(3, 9).reshape(2, 3),
        },
        **SPEECH,
    ),
    hf(
        "Wav2Vec2ForCTC",
        "lm_head",
        "wav2vec2.feature_extractor.conv_layers.0.conv",
        vocab_size=16,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        inputs=lambda: {"input_values": torch.linspace(-3, 3, 800).sin().reshape(2, 400)},
        **TOWER,
    ),
    hf(
        "ViTForImageClassification",
        "classifier",
        "vit.embeddings.patch_embeddings.projection",
        fast=True,
        inputs=image(),
        **PATCHES,
    ),
    hf(
        "DeiTForImageClassification",
        "classifier",
        "deit.embeddings.patch_embeddings.projection",
        inputs=image(),
        **PATCHES,
    ),
    hf(
        "SwinForImageClassification",
        "classifier",
        "swin.embeddings.patch_embeddings.projection",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
        inputs=image(),
    ),
    hf(
        "ConvNextForImageClassification",
        "classifier",
        "convnext.embeddings.patch_embeddings",
        fast=True,
        inputs=image(),
        **FOURS,
    ),
    hf(
        "ResNetForImageClassification",
        "classifier.1",
        "resnet.embedder.embedder.convolution",
        embedding_size=16,
        inputs=image(),
        **FOURS,
    ),
    hf(
        "SegformerForSemanticSegmentation",
        "decode_head.classifier",
        "segformer.stages.0.patch_embeddings.proj",
        inputs=image(64),
        hidden_sizes=[16, 16, 24, 32],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
        num_attention_heads=[1, 2, 2, 4],
        num_labels=5,
    ),
    hf(
        "CLIPModel",
        "visual_projection",
        "text_projection",
        "vision_model.embeddings.patch_embedding",
        inputs=lambda: {**ids()(), **image()()},
        **PAIR,
    ),
    hf(
        "SiglipModel",
        "text_model.head",
        "vision_model.head.mlp.fc2",
        "vision_model.embeddings.patch_embedding",
        inputs=lambda: {**ids()(), **image()()},
        text_config={**TEXT, "projection_size": 32},
        vision_config=VISION,
        exact=False,
    ),
]

TORCHVISION = [
    tv("alexnet", "features.0", "classifier.6"),
    tv("vgg11", "features.0", "classifier.6", size=32),
    tv("resnet18", "conv1", "fc", fast=True, size=32),
    tv("densenet121", "features.conv0", "classifier"),
    tv("googlenet", "conv1.conv", "aux1.fc2", "aux2.fc2", "fc", init_weights=False, size=128),
    tv("mobilenet_v2", "features.0.0", "classifier.1", fast=True, size=32),
    tv("mobilenet_v3_small", "features.0.0", "classifier.3"),
    tv("efficientnet_b0", "features.0.0", "classifier.1"),
    tv("squeezenet1_1", "features.0", "classifier.1"),
    tv("shufflenet_v2_x0_5", "conv1.0", "fc"),
    tv("regnet_y_400mf", "stem.0", "fc"),
    tv("convnext_tiny", "features.0.0", "classifier.2"),
    tv("vit_b_32", "conv_proj", "heads.head", image_size=64),
    # its attention reads the weights past the layers
    tv("swin_t", "features.0.0", "features.*.attn.qkv", "features.*.attn.proj", "head"),
]

TIMM = [
    ti("resnet10t", "conv1.0", "fc"),
    ti("resnext26ts", "stem.*", "head.fc"),
    ti("resnet26d", "conv1.0", "fc"),
    ti("efficientnet_lite0", "conv_stem", "classifier"),
    ti("mobilenetv3_small_050", "conv_stem", "classifier", fast=True, size=32),
    ti("mobilenetv4_conv_small_035", "conv_stem", "classifier"),
    ti("convnext_atto", "stem.0", "head.fc", fast=True, size=32),
    ti("convnextv2_atto", "stem.0", "head.fc"),
    ti("vit_tiny_patch16_224", "patch_embed.proj", "head", img_size=64),
    ti("deit_tiny_distilled_patch16_224", "patch_embed.proj", "head", "head_dist", img_size=64),
    ti("mixer_s32_224", "stem.proj", "head", img_size=64),
    ti("gmlp_ti16_224", "stem.proj", "head", img_size=64),
    ti("levit_128s", "stem.*", "head.linear", "head_dist.linear", size=224),
    ti("poolformer_s12", "stem.conv", "head.fc"),
    ti("regnetx_002", "stem.conv", "head.fc"),
    ti("ghostnet_050", "conv_stem", "classifier"),
    ti("mnasnet_small", "conv_stem", "classifier"),
    ti("tinynet_e", "conv_stem", "classifier"),
    ti("fbnetv3_b", "conv_stem", "classifier"),
    ti("hardcorenas_a", "conv_stem", "classifier"),
    ti("repvgg_a0", "stem.conv_kxk.conv", "stem.conv_1x1.conv", "head.fc"),
    ti("mobileone_s0", "stem.conv_kxk.0.conv", "stem.conv_scale.conv", "head.fc"),
    ti("swin_tiny_patch4_window7_224", "patch_embed.proj", "head.fc", img_size=64, window_size=4),
    ti("pvt_v2_b0", "patch_embed.proj", "head"),
    ti("mobilevit_xxs", "stem.conv", "head.fc"),
    ti("edgenext_xx_small", "stem.0", "head.fc"),
    ti("tf_efficientnet_lite0", "conv_stem", "classifier"),
    ti("ese_vovnet19b_slim_dw", "stem.0.conv", "stem.1.*", "stem.2.*", "head.fc"),
]

ALL = {"transformers": TRANSFORMERS, "torchvision": TORCHVISION, "timm": TIMM}
