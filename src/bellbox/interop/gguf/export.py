"""The GGUF export: a file of a model's weights, with nothing of how it rounds activations.

What llama.cpp computes from the file is another function than the trained one: activations are not coded there (it
rounds them to 8 bits in its own way, inside of products). The file says so in its metadata.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bellbox.core.entropy import ENTROPY_LIMIT, code_counts, entropy_bits
from bellbox.errors import BellboxError, require
from bellbox.interop.gguf.architectures import Tensors, architecture_of
from bellbox.interop.gguf.block_types import NAMES
from bellbox.interop.gguf.vocabulary import NotTheSame, Vocabulary, read_vocabulary, write_vocabulary
from bellbox.interop.gguf.weights import Coded, Written, decoded, encode, encode_floats
from bellbox.nn.packed import PackedLayer
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.tools import unique_tensors
from bellbox.utils.files import new_file

FLOAT_TYPES = ("f32", "f16", "bf16", "q8_0")
WEIGHTS_ONLY = (
    "Weights only: trained and quantized with Bellbox together with its activations, which are not quantized here, so "
    "that this file computes another function than the trained model."
)
"""What a file says of itself whose model was trained with low-bit activations."""
_FLOAT_INPUTS = (
    "Low-bit weights, trained with Bellbox on activations in floats; their scales are rounded to fp16."
)
_UNQUANTIZED = "In full precision, written by Bellbox."


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor of a file."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    of_integers: bool
    """Whether it holds codes of ours, exactly but for the scales."""
    natural: str | None
    """The narrower type that its grid would have had, where that was not taken."""
    levels: int | None = None
    """Of our codes; None of floats."""
    entropy: float | None = None
    """Bits that a code carries; None of floats, and in a large model, where it is not counted."""


@dataclass(frozen=True)
class GGUFFile:
    """What was written."""

    path: Path
    architecture: str
    description: str
    """What the file says of itself, to be shown wherever it is named."""
    tensors: list[WrittenTensor]
    bytes: int
    scale_change: float
    """Largest relative change of a scale by its rounding to fp16."""
    small_scales: int
    """Scales below fp16's normal range, kept to 6e-8."""
    vocabulary: str | None
    """`llama` or `gpt2`; None where there is none."""
    remark: str | None
    """Why there is none."""
    unchecked: tuple[str, ...]
    """Types that the `gguf` package cannot decode, so that their blocks were not compared."""


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Path | None = None,
    name: str = "",
    floats: str = "f32",
    avoid: Collection[str] = (),
    check: bool = True,
) -> GGUFFile:
    """Write the weights of a LLaMA or GPT as a GGUF file.

    Low-bit weights go into the narrowest type that holds their grid exactly and whose blocks divide their rows; only
    their scales are rounded, to fp16. Embeddings and heads that are stored as integers (int8, int4) stay these.

    Args:
        model: prepared or packed, or in full precision; its weights must not be rotated (block 1).
        path: the file; an earlier one is replaced.
        tokenizer: `tokenizer.json` or a sentencepiece `.model` to put into it.
        name: of the model, for people.
        floats: what matrices in full precision become: `f32` as they are, else rounded: `f16`, `bf16`, `q8_0`.
        avoid: types not to use, such as Q1_0, which older programs do not know.
        check: decode every block again and compare.

    Raises:
        BellboxError: another architecture, a weight that no type holds, or the file cannot be written.
    """
    gguf: Any = require("gguf", "gguf")
    for kind in avoid:
        if kind not in NAMES:
            raise BellboxError(f"no type {kind!r} to avoid; there are: {', '.join(NAMES)}")
    if floats not in FLOAT_TYPES:
        raise BellboxError(f"matrices in full precision can be {', '.join(FLOAT_TYPES)}, not {floats!r}")
    target = Path(path)
    if not target.parent.is_dir():
        raise BellboxError(f"{target.parent}: no such folder")
    if target.is_dir():
        raise BellboxError(f"{target}: is a folder, and a GGUF model is one file; name a file in it")
    architecture = architecture_of(model)
    written: dict[str, Written] = {}
    coded: dict[str, tuple[int, float | None]] = {}
    cheap = sum(parameter.numel() for parameter in unique_tensors(model).values()) <= ENTROPY_LIMIT
    for tensors in architecture.tensors:
        written[tensors.name] = _written(tensors, floats, avoid, check)
        if isinstance(tensors.parts[0], Coded):
            coded[tensors.name] = _levels_and_entropy(tensors.parts, cheap)
    vocabulary, remark = _vocabulary(tokenizer, architecture.vocabulary)
    with new_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        description = _description(model, bool(coded))
        _describe(writer, gguf, name or target.stem, description, [written[each].type for each in coded])
        architecture.describe(writer)
        write_vocabulary(writer, vocabulary)
        for each, tensor in written.items():
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor(each, tensor.data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        shapes = _read_back(gguf, temporary, written)
    kinds = {written[each].type for each in coded}
    return GGUFFile(
        path=target,
        architecture=architecture.name,
        description=description,
        tensors=[
            WrittenTensor(
                each,
                t.type,
                shapes[each],
                t.data.nbytes,
                each in coded,
                t.natural,
                *coded.get(each, (None, None)),
            )
            for each, t in written.items()
        ],
        bytes=target.stat().st_size,
        scale_change=max((t.scale_change for t in written.values()), default=0.0),
        small_scales=sum(t.small_scales for t in written.values()),
        vocabulary=None if vocabulary is None else vocabulary.model,
        remark=remark,
        unchecked=tuple(sorted(kind for kind in kinds if not _decodes(kind))),
    )


def _written(tensors: Tensors, floats: str, avoid: Collection[str], check: bool) -> Written:
    parts = tensors.parts
    coded = [part for part in parts if isinstance(part, Coded)]
    if len(coded) == len(parts):
        return encode(tensors.name, coded, avoid, check)
    if coded:
        raise BellboxError(
            f"{tensors.name}: some of q, k and v are quantized and some are not, and they are one tensor in GGUF"
        )
    values = torch.cat([part for part in parts if isinstance(part, Tensor)])
    if not bool(values.isfinite().all()):
        raise BellboxError(f"{tensors.name}: holds NaN or infinity")
    # llama.cpp adds rows of positions as floats, and reads them as they are.
    return encode_floats(values, "f32" if tensors.name == "position_embd.weight" else floats)


def _levels_and_entropy(parts: list[Coded | Tensor], counted: bool) -> tuple[int, float | None]:
    """Levels of a tensor's codes, and the bits that a code of it carries."""
    coded = [part for part in parts if isinstance(part, Coded)]
    levels = max(part.grid.n for part in coded)
    if not counted:
        return levels, None
    counts = torch.stack([code_counts(torch.from_numpy(part.codes), levels) for part in coded])
    return levels, entropy_bits(counts.sum(0))


def _vocabulary(tokenizer: Path | None, size: int) -> tuple[Vocabulary | None, str | None]:
    if tokenizer is None:
        return None, "no tokenizer lies with the model"
    try:
        return read_vocabulary(tokenizer, size), None
    except NotTheSame as reason:
        return None, f"{tokenizer.name}: {reason}"


def _description(model: nn.Module, low_bit: bool) -> str:
    coded = any(
        isinstance(m, PackedLayer) or (isinstance(m, QuantizedLayer) and m.activation_quantizer is not None)
        for m in model.modules()
    )
    return WEIGHTS_ONLY if coded else _FLOAT_INPUTS if low_bit else _UNQUANTIZED


_FILE_TYPES = {
    "F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"
}  # fmt: skip
"""llama.cpp's names of mixtures, where they are not those of the type."""


def _describe(writer: Any, gguf: Any, name: str, description: str, types: list[str]) -> None:
    writer.add_name(name)
    writer.add_description(description)
    writer.add_bool("bellbox.weights_only", description == WEIGHTS_ONLY)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    most = max(types, key=types.count) if types else "F32"
    known = gguf.LlamaFileType
    writer.add_file_type(getattr(known, _FILE_TYPES.get(most, f"MOSTLY_{most}"), known.GUESSED))


def _read_back(gguf: Any, path: Path, written: dict[str, Written]) -> dict[str, tuple[int, ...]]:
    """The file as the `gguf` package reads it, byte for byte; shapes as torch writes them."""
    reader = gguf.GGUFReader(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in reader.tensors:
        expected = written.get(tensor.name)
        if expected is None:
            shapes[tensor.name] = tuple(reversed(tensor.shape.tolist()))
            continue
        same = tensor.tensor_type.name == expected.type
        if not same or not np.array_equal(tensor.data.view(np.uint8), expected.data.view(np.uint8)):
            raise RuntimeError(f"{path}: {tensor.name} reads back otherwise; this is a defect of Bellbox")
        shapes[tensor.name] = tuple(reversed(tensor.shape.tolist()))
    return shapes


def _decodes(kind: str) -> bool:
    block = {"Q1_0": 18}.get(kind)
    return block is None or decoded(kind, np.zeros((1, block), dtype=np.uint8)) is not None
