from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bellbox.errors import BellboxError
from bellbox.models import GPT, GPTConfig, Llama, LlamaConfig, build, load_hf, preset, save_hf
from bellbox.models.hf import HFFolder

SHARED = Path(
    os.environ.get("BELLBOX_SHARED_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data"
)
STORIES = SHARED / "models" / "stories260K_hf"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")


def same_logits(model, folder_or_reference, vocabulary: int, tokens: int = 40) -> None:
    transformers = pytest.importorskip("transformers")
    reference = folder_or_reference
    if isinstance(reference, Path):
        reference = transformers.AutoModelForCausalLM.from_pretrained(reference)
    ids = torch.randint(vocabulary, (3, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.eval().float()(ids).logits
        torch.testing.assert_close(model(ids), expected, atol=2e-5, rtol=1e-4)
    assert expected.std() > 0.01


def small_llama(**fields):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        **fields,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def small_gpt2(**fields):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=67, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **fields
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def small_opt(**fields):
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=67,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
        dropout=0.0,
        **fields,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@needs_stories
def test_a_real_llama_has_the_same_logits_as_in_transformers():
    model = load_hf(STORIES)
    assert isinstance(model, Llama)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    same_logits(model, STORIES, 512, tokens=200)


@needs_stories
def test_loading_and_saving_a_real_llama_loses_nothing(tmp_path):
    save_hf(load_hf(STORIES), tmp_path)
    before, after = load_file(STORIES / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    same_logits(load_hf(STORIES), tmp_path, 512)


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_of_transformers_goes_there_and_back(tmp_path, make, tied):
    reference = make(tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs")
    same_logits(model, reference, 67)
    save_hf(model, tmp_path / "ours")
    same_logits(model, tmp_path / "ours", 67)
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_hf(tmp_path / "ours").config == model.config


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_opt_is_read_as_a_gpt_with_relu(tmp_path, tied):
    reference = small_opt(tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs")
    assert isinstance(model, GPT)
    same_logits(model, reference, 67)
    save_hf(model, tmp_path / "ours")
    same_logits(model, tmp_path / "ours", 67)
    assert load_hf(tmp_path / "ours").config == model.config


def test_an_opt_checkpoint_of_the_bare_body_is_read(tmp_path):
    reference = small_opt()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    same_logits(load_hf(tmp_path), reference, 67)


@pytest.mark.parametrize("make", [small_llama, small_gpt2, small_opt])
def test_a_block_is_read_by_itself(tmp_path, make):
    make().save_pretrained(tmp_path)
    whole, source = load_hf(tmp_path).state_dict(), HFFolder(tmp_path)
    pieces = [source.rest(), source.block(0), source.block(1)]
    assert all(torch.equal(whole[name], t) for piece in pieces for name, t in piece.items())
    assert len({name for piece in pieces for name in piece}) == sum(map(len, pieces))
    assert set(whole) - {name for piece in pieces for name in piece} <= {"lm_head.weight"}
    assert all(".1." in name for name in pieces[2])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"do_layer_norm_before": False}, "no norm stands before"),
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
        ({"activation_function": "gelu"}, "activation_function"),
        ({"enable_bias": False}, "enable_bias"),
    ],
)
def test_an_opt_configuration_that_cannot_be_honoured_is_refused(tmp_path, fields, says):
    small_opt().save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(BellboxError, match=says):
        load_hf(tmp_path)


def test_a_theta_beyond_64_bits_is_a_number_like_others():
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole, real = (build(LlamaConfig(64, **size, rope_theta=theta), 0) for theta in (10**30, 1e30))
    tokens = torch.arange(8)[None]
    assert torch.equal(whole(tokens), real(tokens))


def test_own_head_width_and_rope_theta_survive(tmp_path):
    config = LlamaConfig(67, 48, 80, 1, 4, 2, 16, 64, rope_theta=500.0, initializer_range=0.2)
    model = build(config, seed=0)
    save_hf(model, tmp_path)
    same_logits(model, tmp_path, 67)
    assert load_hf(tmp_path).config == LlamaConfig(**{**vars(config)})


def test_shards_are_read(tmp_path):
    reference = small_llama()
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_logits(load_hf(tmp_path), reference, 67)


def test_half_precision_is_widened_exactly(tmp_path):
    reference = small_llama().bfloat16()
    reference.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    theirs = reference.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, theirs[name].float())
    save_hf(model.bfloat16(), tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_gpt2_checkpoint_of_the_bare_body_is_read(tmp_path):
    reference = small_gpt2()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # the mask that old versions stored
    save_file(bare, tmp_path / "model.safetensors")
    model = load_hf(tmp_path)
    assert isinstance(model, GPT)
    same_logits(model, reference, 67)


def test_loaded_weights_do_not_hang_on_the_file(tmp_path):
    save_hf(build(preset("tiny", vocab_size=67, hidden_size=32, intermediate_size=32), seed=0), tmp_path)
    model = load_hf(tmp_path)
    before = model.lm_head.weight.detach().clone()
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(model.lm_head.weight, before)


def test_saving_leaves_only_the_two_files_and_replaces_them(tmp_path):
    config = preset("gpt-tiny", vocab_size=67, hidden_size=32, intermediate_size=32)
    save_hf(build(config, seed=0), tmp_path)
    save_hf(build(config, seed=1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_hf(tmp_path).lm_head.weight, build(config, seed=1).lm_head.weight)


def test_what_is_no_plain_model_is_not_saved(tmp_path):
    model = build(preset("tiny", vocab_size=67, hidden_size=32, intermediate_size=32), seed=0)
    model.model.layers[0].mlp.up_proj.register_buffer("gamma", torch.ones(1))
    with pytest.raises(BellboxError, match=r"up_proj\.gamma"):
        save_hf(model, tmp_path / "out")
    with pytest.raises(BellboxError, match="not Linear"):
        save_hf(torch.nn.Linear(2, 2), tmp_path / "out")  # pyright: ignore
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folder(tmp_path):
    """A good folder, for a test to spoil."""
    save_hf(build(LlamaConfig(67, 32, 48, 1, 4, max_position_embeddings=64), seed=0), tmp_path)
    return tmp_path


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": 3}, "not an object"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; .* from 1 to 1024"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings"),
        ({"max_position_embeddings": 2**20, "head_dim": 8192}, "times head_dim 8192 is above 134217728"),
        ({"num_attention_heads": 3}, "num_attention_heads 3"),
        ({"vocab_size": 68}, r"lm_head.weight' has shape \[67, 32\], but config.json asks for \[68, 32\]"),
        ({"num_hidden_layers": 2}, r"no tensor 'model\.layers\.1\..*\(9 missing in all\)"),
        ({"tie_word_embeddings": True}, "differs from the embedding"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(folder, fields, says):
    change_config(folder, **fields)
    with pytest.raises(BellboxError, match=says) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"activation_function": "silu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_embd": None}, "hidden_size is None"),
        ({"n_embd": None, "n_inner": None}, "hidden_size is None"),
    ],
)
def test_a_gpt2_configuration_that_cannot_be_honoured_is_refused(tmp_path, fields, says):
    save_hf(build(GPTConfig(67, 32, 48, 1, 4, max_position_embeddings=64), seed=0), tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(BellboxError, match=says):
        load_hf(tmp_path)


def test_a_missing_key_or_file_is_named(folder, tmp_path_factory):
    values = json.loads((folder / "config.json").read_text())
    del values["hidden_size"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(BellboxError, match="has no 'hidden_size'"):
        load_hf(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(BellboxError, match="holds no JSON object"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BellboxError, match="not readable as JSON"):
        load_hf(folder)
    (folder / "config.json").write_text('{"model_type": ["llama"]}')
    with pytest.raises(BellboxError, match=r"model_type is \['llama'\]; Bellbox reads"):
        load_hf(folder)
    with pytest.raises(BellboxError, match="does not exist"):
        load_hf(tmp_path_factory.mktemp("empty"))


def test_broken_and_foreign_weights_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BellboxError, match="cannot be read as safetensors"):
        load_hf(folder)
    path.write_bytes(whole)
    tensors = load_file(path)
    for change, says in (
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias' has no place"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}, "model.norm.weight' is of type I32"),
    ):
        save_file({**tensors, **change}, path)
        with pytest.raises(BellboxError, match=says):
            load_hf(folder)
    path.unlink()
    with pytest.raises(BellboxError, match="holds neither"):
        load_hf(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "weights.bin", 3])
def test_an_index_cannot_leave_the_folder(folder, shard):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": shard}})
    )
    with pytest.raises(BellboxError, match=r"is not the name of a \.safetensors file"):
        load_hf(folder)


def test_an_index_that_lies_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"nowhere": "part.safetensors"}}))
    with pytest.raises(BellboxError, match="no tensor 'nowhere'"):
        load_hf(folder)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(BellboxError, match=r"gone\.safetensors cannot be read"):
        load_hf(folder)
