"""Distillation: a low-bit student learns a full-precision teacher's distribution besides the text itself.

    loss = (1 - weight) * cross entropy + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))

(Hinton, Vinyals and Dean, arXiv 1503.02531: the factor T^2 keeps the size of the gradient.) The teacher says of every
token how likely each next one is, where the text shows one of them, so its gradient is less noisy.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.errors import BellboxError
from bellbox.formats.auto import open_data_for, open_model
from bellbox.runs.config import ResolvedConfig


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student), mean over all positions, in nats.

    Args:
        student: logits `[..., vocabulary]`.
        teacher: likewise; no gradient reaches them.
        temperature: T.
    """
    target = F.log_softmax(teacher.detach().float() / temperature, dim=-1).flatten(0, -2)
    given = F.log_softmax(student.float() / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * F.kl_div(given, target, reduction="batchmean", log_target=True)


class Teacher:
    """The frozen model of `distill.teacher`.

    Args:
        config: resolved.
        device: where it is to run.

    Raises:
        BellboxError: no model there, or one that does not fit the data or the student.
    """

    def __init__(self, config: ResolvedConfig, device: torch.device) -> None:
        section = config.distill
        assert section.teacher is not None
        self.weight, self.temperature = section.weight, section.temperature
        try:
            opened = open_model(section.teacher)
            _, self.unchecked = open_data_for(opened, config.data.sources[0])
        except BellboxError as error:
            raise BellboxError(f"distill.teacher: {error}") from None
        shape = opened.model.config
        vocabulary = config.model.overrides["vocab_size"]
        if shape.vocab_size != vocabulary:  # pyright: ignore[reportAttributeAccessIssue]
            raise BellboxError(
                f"distill.teacher '{section.teacher}' has a vocabulary of {shape.vocab_size}, the student of "  # pyright: ignore[reportAttributeAccessIssue]
                f"{vocabulary}; both must be equal (model.overrides.vocab_size)"
            )
        if shape.max_position_embeddings < config.data.context:  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
            raise BellboxError(
                f"distill.teacher '{section.teacher}' takes {shape.max_position_embeddings} tokens, data.context is "  # pyright: ignore[reportAttributeAccessIssue]
                f"{config.data.context}; shorten that"
            )
        self.model = opened.model.requires_grad_(False).eval().to(device)
        self.checksum = _checksum(self.model)
        """SHA-256 of its tensors: a run goes on with the teacher that it began with."""

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """`[batch, tokens, vocabulary]` of `[batch, tokens]`."""
        return self.model(inputs)


def _checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
