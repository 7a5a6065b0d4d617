"""`bellbox export hf`: transformers' own classes compute the same; the model card; the command."""

from __future__ import annotations

import re

import pytest
import torch
from hf_models import IDS, LLAMA, bellbox_greedy, greedy, logits, packed_model

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.models import GPTConfig, Llama, LlamaConfig, build
from bellbox.nn import PackedLinear

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPTConfig(97, 32, 64, 2, 4, 64), "GPT2LMHeadModel"),
        (GPTConfig(97, 32, 64, 2, 4, 64, bias=False, activation="gelu_erf"), "GPT2LMHeadModel"),
        (GPTConfig(97, 32, 64, 2, 4, 64, fused_qkv=True), "GPT2LMHeadModel"),
        (GPTConfig(97, 32, 64, 2, 4, 64, activation="relu"), "OPTForCausalLM"),
        (LLAMA, "LlamaForCausalLM"),
    ],
    ids=["gpt", "without biases", "fused", "relu", "llama"],
)
@pytest.mark.parametrize("embeddings", ["fp32", "int8"])
def test_transformers_own_classes_compute_the_same(config, name, embeddings, transformers, tmp_path) -> None:
    from bellbox.interop.transformers.export import export_packed

    model = packed_model(config, embeddings=embeddings)
    export_packed(model, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(loaded).__name__ == name
    if name == "OPTForCausalLM":  # whose attention scales its queries first
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(greedy(loaded, IDS[:, :5]), bellbox_greedy(model, IDS[:, :5]))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        GPTConfig(97, 32, 64, 2, 4, 64),
        GPTConfig(97, 48, 80, 2, 3, 64, activation="gelu_erf"),
        LlamaConfig(97, 48, 56, 2, 6, 2, max_position_embeddings=64, rope_theta=5e5),
    ],
    ids=["llama", "gpt", "gpt of odd widths", "llama of odd widths"],
)
def test_a_text_in_parts_has_the_bits_of_our_own_model(config, transformers, tmp_path) -> None:
    """A prompt, more of it, single tokens; over both caches: norms, activation, positions and attention are ours."""
    from bellbox.interop.transformers.export import export_packed

    model = packed_model(config)
    export_packed(model, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(3))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    body = model.model if isinstance(model, Llama) else model.transformer
    with torch.no_grad():  # before the head, which is torch's in both
        expected = body(ids, None, last_only=False, exact=False)
    for cache in (
        transformers.DynamicCache(config=loaded.config),
        transformers.StaticCache(config=loaded.config, max_cache_len=64),
    ):
        begin, parts = 0, []
        for length in (7, 20, 1, 1, 9, 2):
            with torch.no_grad():
                found = loaded.base_model(
                    ids[:, begin : begin + length], past_key_values=cache, use_cache=True
                )
            parts.append(found.last_hidden_state)
            begin += length
        assert torch.equal(torch.cat(parts, 1), expected)


def test_what_our_arithmetic_is_not_for_goes_by_transformers_own(transformers, tmp_path) -> None:
    """Padding, gradients, other dtypes, eager attention: near the same, and no error."""
    from bellbox.interop.transformers.export import export_packed

    model = packed_model(LLAMA)
    export_packed(model, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    expected = logits(model)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[:, :4] = 0
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), IDS), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = loaded(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(loaded(IDS, attention_mask=torch.ones_like(IDS)).logits, expected)
    torch.testing.assert_close(loaded(IDS).logits.detach(), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert loaded.to(torch.bfloat16)(IDS).logits.isfinite().all()
    eager = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    with torch.no_grad():
        seen = eager(IDS, output_attentions=True)
    assert seen.attentions[0].shape == (2, 4, 16, 16)
    torch.testing.assert_close(seen.logits, expected, rtol=1e-4, atol=1e-4)


def test_a_gpt_whose_q_k_and_v_are_not_alike_is_refused(transformers, tmp_path) -> None:
    from bellbox.interop.transformers.export import export_packed

    config = GPTConfig(97, 32, 64, 2, 4, 64)
    for recipe in (
        bb.Recipe.of("lsq", 4, share_inputs=False),
        bb.Recipe.bbq(2, keep=("*.k_proj",)),
        bb.Recipe.bbq(2, keep=("*.q_proj",)),
    ):
        model = packed_model(config, recipe)
        layer = model.transformer.h[0].attn.v_proj
        layer.act_scale = layer.act_scale * 1.5
        with pytest.raises(bb.BellboxError, match="q, k and v as one layer"):
            export_packed(model, tmp_path / "m")
        assert not (tmp_path / "m").exists()
    bb.save(packed_model(config), tmp_path / "saved")
    with pytest.raises(bb.BellboxError, match="bellbox export hf"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_the_card_counts_what_is_there(ours, folder) -> None:
    text = (folder / "README.md").read_text()
    assert text.index("needs Bellbox") < text.index("## Size")
    sizes = {
        row[1]: [int(cell.replace(",", "")) for cell in row.groups()[1:]]
        for row in re.finditer(r"^\| \**([a-z][^|*]*?)\** \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    }
    whole = sizes.pop("all of it")
    on_disk = sum((folder / name).stat().st_size for name in ("model.safetensors", "config.json"))
    assert whole == [sum(p for p, _ in sizes.values()), on_disk]
    assert sum(size for _, size in sizes.values()) == on_disk
    assert whole[0] == sum(p.numel() for p in build(LLAMA).parameters())
    layers = [m for m in ours.modules() if isinstance(m, PackedLinear)]
    codes = sum(m.weight_packed.nbytes for m in layers)
    assert sizes["codes of low-bit layers"] == [sum(m.row_length * m.row_count for m in layers), codes]
    assert f"| {8 * on_disk / whole[0]:.3f} |" in text


def test_the_model_that_is_read_is_not_written_over(tmp_path) -> None:
    from bellbox.cli.export_hf import main

    bb.save(packed_model(LLAMA), tmp_path / "packed")
    before = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "packed")
    for out in ("packed", "link"):
        with pytest.raises(BellboxError, match="is the model itself, which would be replaced"):
            main([str(tmp_path / "packed"), str(tmp_path / out)])
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == before


def test_the_command(transformers, tmp_path, capsys) -> None:
    from bellbox.cli.main import main
    from bellbox.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 3, 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    from dataclasses import replace

    model = packed_model(replace(LLAMA, vocab_size=tokenizer.vocab_size))
    bb.save(model, tmp_path / "packed", tokenizer=tmp_path / "tokenizer.json")
    (tmp_path / "packed" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "packed" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    main(["export", "hf", str(tmp_path / "packed"), str(tmp_path / "out")])
    assert "its README.md says how to load it" in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = words("the quick", return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode("the quick")
    assert words.eos_token_id == loaded.config.eos_token_id == tokenizer.end_of_text
    assert words.chat_template == "{{ messages[0].content }}"
    assert loaded.generation_config.temperature == 0.5
    found = greedy(loaded, ids, 8)[0]
    expected = bellbox_greedy(model, ids, 8)[0]
    assert torch.equal(found, expected[: len(found)])
    # bellbox opens what it wrote for transformers, and writes it again
    main(["export", "hf", str(tmp_path / "out"), str(tmp_path / "again")])
    main(
        [
            "generate",
            str(tmp_path / "again"),
            "--prompt",
            "the",
            "--max-new-tokens",
            "4",
            "--temperature",
            "0",
        ]
    )
    capsys.readouterr()
    for wrong in (
        ["export", "hf", str(tmp_path), "x"],
        ["export", "nosuch", "a", "b"],
        ["export", "hf", "a"],
    ):
        with pytest.raises(SystemExit) as refused:
            main(wrong)
        assert refused.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
