"""Opening whatever a MODEL argument names: a run folder, a packed or binarized folder, or a Hugging Face folder.

Every command that takes a model goes through here, so all of them accept the same things and refuse the rest
in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from bellbox.errors import BellboxError
from bellbox.formats import BINARIZED
from bellbox.formats import packed as io
from bellbox.models import ResNet, ResNetConfig, ViT, ViTConfig
from bellbox.nn import nested_widths, set_bits
from bellbox.nn.compact import Precision
from bellbox.utils.files import says_format

if TYPE_CHECKING:
    from bellbox.data.images import ImageDataset
    from bellbox.data.shards import TokenDataset
    from bellbox.data.tokenizer import Tokenizer
    from bellbox.runs.open import LoadedRun

Kind = Literal["run", "packed", "binarized", "huggingface"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class OpenedModel:
    """A model and what belongs to it."""

    path: Path
    """The folder that was named."""
    model: nn.Module
    """In evaluation mode, on the CPU."""
    kind: Kind
    """What the folder is."""
    tokenizer: Path | None
    """The tokenizer file that lies with the model; None where there is none."""
    context: int
    """Tokens: what a run was trained with; the longest sequence that any other model takes. 0 of a vision model."""
    description: str
    """One line for the user."""
    run: LoadedRun | None = None
    """The run, where it is one."""
    widths: tuple[int, ...] = ()
    """Bits of the widths that it can be used at, the widest first; empty where it has one."""
    bits: int | None = None
    """Of the width that it is used at; None where it has one."""

    @property
    def is_vision(self) -> bool:
        """Whether it takes images."""
        return isinstance(self.model, ResNet | ViT)

    @property
    def companions(self) -> tuple[Path, ...]:
        """Folders where a chat template or a generation configuration may lie: the model's, and what a run began with.

        The first that has a file wins.
        """
        begun = self.run.config.model.pretrained if self.run is not None else None
        places = [self.path, *([] if begun is None else [Path(begun)])]
        return tuple(place for place in places if place.is_dir())

    def load_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            BellboxError: there is none, or it cannot be read.
        """
        from bellbox.data.tokenizer import Tokenizer

        if self.tokenizer is None:
            raise BellboxError(f"{self.path}: no tokenizer lies with the model; put tokenizer.json there")
        return Tokenizer.load(self.tokenizer)


def open_model(
    path: str | Path,
    checkpoint: str = "last",
    embeddings: Precision | None = None,
    bits: int | None = None,
) -> OpenedModel:
    """Open a model of any kind.

    Args:
        path: a run folder (`bellbox train`), a packed folder (`bellbox convert`), a binarized one (`bellbox ptq`),
            or a Hugging Face folder with a LLaMA, GPT-2 or OPT.
        checkpoint: of a run: `last`, `best`, or a step.
        embeddings: of a packed or binarized model: `bf16` or `int8` rounds its fp32 embeddings and head.
        bits: of a nested run or packed model: the width to use it at; its widest where None.

    Raises:
        BellboxError: nothing of the kind is there, it is damaged, or a checkpoint or a width is named for a model that
            has none.
    """
    root, kind = Path(path), kind_of(path)
    if embeddings is not None and kind not in ("packed", "binarized"):
        raise BellboxError(
            f"{root}: only a packed or binarized model's embeddings can be rounded; convert it first"
        )
    if bits is not None and kind not in ("run", "packed"):
        raise BellboxError(
            f"{root}: --bits is for models of several widths, and this one has none; leave it out"
        )
    if kind == "run":
        return _open_run(root, checkpoint, bits)
    if checkpoint != "last":
        raise BellboxError(f"{root}: only a run has checkpoints, and this is none; leave out --checkpoint")
    if kind == "packed":
        model, widths = io.load(root, embeddings=embeddings, bits=bits), io.folder_widths(root)
        tokenizer = io.tokenizer_path(root) or _tokenizer_beside(root)
        used = bits or next(iter(widths), None)
        about = f"packed model {root}: {_shape(model)}{_width(used, widths)}"
        return OpenedModel(root, model, "packed", tokenizer, _longest(model), about, widths=widths, bits=used)
    if kind == "binarized":
        from bellbox.formats import binarized

        model, tokenizer = io.load(root, embeddings=embeddings), binarized.tokenizer_path(root)
        about = f"binarized model {root}: {_shape(model)}"
        return OpenedModel(root, model, "binarized", tokenizer, _longest(model), about)
    from bellbox.models import load_hf

    model = load_hf(root)
    tokenizer = _tokenizer_beside(root)
    about = f"Hugging Face model {root}: {_shape(model)}"
    return OpenedModel(root, model, "huggingface", tokenizer, _longest(model), about)


def kind_of(path: str | Path) -> Kind:
    """What a folder is, by the files in it.

    Raises:
        BellboxError: no such folder, or none of a model.
    """
    from bellbox.runs.open import CONFIG_FILE

    root = Path(path)
    if not root.is_dir():
        raise BellboxError(f"{root}: no such folder")
    if (root / CONFIG_FILE).is_file():
        return "run"
    if io.is_packed(root):
        return "packed"
    if says_format(root / "config.json", BINARIZED):
        return "binarized"
    if (root / "config.json").is_file():
        return "huggingface"
    raise BellboxError(
        f"{root}: no model here: neither a run (config.yaml, checkpoints/), nor a packed, binarized or Hugging Face "
        "model (config.json, model.safetensors)"
    )


def _tokenizer_beside(root: Path) -> Path | None:
    return next((root / name for name in _TOKENIZERS if (root / name).is_file()), None)


def _open_run(root: Path, checkpoint: str, bits: int | None) -> OpenedModel:
    from bellbox.runs.open import load_run

    run = load_run(root, checkpoint)
    widths = nested_widths(run.model)
    if bits is not None:
        try:
            set_bits(run.model, bits)
        except BellboxError as error:
            raise BellboxError(f"{root}: {error}") from None
    used = bits or next(iter(widths), None)
    vision = run.config.task == "vision"
    unit, context = ("images", 0) if vision else ("tokens", run.config.data.context)
    about = f"run {root} at step {run.step:,} ({run.tokens:,} {unit}): {_shape(run.model)}"
    about += _width(used, widths)
    return OpenedModel(root, run.model, "run", run.tokenizer, context, about, run, widths, used)


def _width(used: int | None, widths: tuple[int, ...]) -> str:
    return f", at {used} bits (of {', '.join(map(str, widths))})" if widths else ""


def _longest(model: nn.Module) -> int:
    return getattr(model.config, "max_position_embeddings", 0)


def _shape(model: nn.Module) -> str:
    config = model.config
    if isinstance(model, ResNet | ViT):
        return f"{type(model).__name__}, {model.config.num_labels} classes"
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} blocks of width {config.hidden_size}, "  # pyright: ignore[reportAttributeAccessIssue]
        f"{config.vocab_size:,} tokens"  # pyright: ignore[reportAttributeAccessIssue]
    )


def open_data_for(opened: OpenedModel, source: str | None) -> tuple[TokenDataset, str | None]:
    """A dataset that fits a model.

    Args:
        opened: the model.
        source: a dataset folder or `classics`; where None, what the run was trained on, else the classics.

    Returns:
        The dataset, and a line about what could not be checked (None where all was).

    Raises:
        BellboxError: no such dataset, it was made with another tokenizer than the model's, or a token occurs that
            the model does not know.
    """
    from bellbox import data

    if opened.is_vision:
        raise BellboxError(f"{opened.path}: is a vision model; this needs one of language")
    section = opened.run.config.data if source is None and opened.run is not None else None
    source = source or (section.name if section is not None else "classics")
    dataset = data.open_mixture(section.mixture) if section and section.mixture else data.open(source)
    remark = None
    if opened.tokenizer is None:
        remark = f"{opened.path} holds no tokenizer: it could not be compared with the data's"
    elif (own := opened.load_tokenizer().sha256) != (other := dataset.manifest.tokenizer_sha256):
        raise BellboxError(
            f"data '{source}' was made with another tokenizer (sha256 {other[:12]}) than {opened.path} (sha256 "
            f"{own[:12]}); prepare it again with --tokenizer {opened.tokenizer}"
        )
    vocabulary: int = opened.model.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    # A tokenizer may have entries beyond the model's, as long as no text needs them.
    if dataset.vocab_size > vocabulary and (largest := dataset.largest_id()) >= vocabulary:
        raise BellboxError(
            f"data '{source}' has tokens up to {largest}, {opened.path} knows {vocabulary}, from 0 to "
            f"{vocabulary - 1}; name data that was prepared with the tokenizer that the model was trained with"
        )
    return dataset, remark


def open_images_for(opened: OpenedModel, source: str | None, size: int | None = None) -> ImageDataset:
    """Images that fit a vision model.

    Args:
        opened: the model.
        source: as `open_images`; where None, what the run was trained on.
        size: height and width that images of any size are scaled to; where None, as the model says.

    Raises:
        BellboxError: no source, or images of other channels, another size or with more classes than the model has.
    """
    from bellbox.data.images import open_images

    config = opened.model.config
    assert isinstance(config, ResNetConfig | ViTConfig)
    if opened.run is not None:
        source = source or opened.run.config.data.source
    usual = config.image_size
    if usual is None and opened.run is not None:  # runs of before models kept it
        usual = opened.run.config.vision.image_size
    if source is None:
        raise BellboxError(f"{opened.path}: name images to look at: --data FILE.npz, a folder, or hf:NAME")
    dataset = open_images(source, size, usual=usual)
    channels, height, _ = dataset.train.shape
    if channels != config.num_channels or (isinstance(config, ViTConfig) and height != config.image_size):
        raise BellboxError(
            f"data '{source}' has images of {dataset.train.shape}, {opened.path} takes other ones"
        )
    if len(dataset.classes) > config.num_labels:
        raise BellboxError(
            f"data '{source}' has {len(dataset.classes)} classes, {opened.path} knows {config.num_labels}"
        )
    return dataset
