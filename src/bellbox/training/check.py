"""Check before a run, in no time and memory: could it begin and change its phases? Hours may pass before it does."""

from __future__ import annotations

from bellbox.errors import BellboxError, require
from bellbox.formats.auto import kind_of
from bellbox.runs.build import check_quantization, pick_device, skeleton
from bellbox.runs.config import ResolvedConfig
from bellbox.runs.phases import phases_of
from bellbox.training.mec import EntropyTerm
from bellbox.training.optim.groups import block_matrices, require_matrices


def check_trainable(config: ResolvedConfig) -> None:
    """Refuse what cannot be trained. Of a teacher only its folder is looked at.

    Args:
        config: of the run.

    Raises:
        BellboxError: naming the key and the way out.
    """
    pick_device(config.device)
    for phase in phases_of(config):
        check_quantization(config, phase.quantization)
    model = skeleton(config)
    if config.optimizer.kind != "adamw":
        require_matrices(config.optimizer.kind, block_matrices(model))
    if config.optimizer.kind == "soap":
        require("pytorch_optimizer", "soap")
    if config.mec.weight:
        EntropyTerm(model, config.mec).remove()
    if config.distill.teacher is not None:
        try:
            kind_of(config.distill.teacher)
        except BellboxError as error:
            raise BellboxError(f"distill.teacher: {error}") from None


def refuse_unsharded(config: ResolvedConfig) -> None:
    """Refuse what needs a model that is not sharded.

    Args:
        config: of a run with fsdp.

    Raises:
        BellboxError: naming the key and the way out.
    """
    if config.optimizer.kind == "soap":
        raise BellboxError(
            "distributed.mode is fsdp, and optimizer.kind soap needs whole gradients; take ddp, or muon"
        )
    if config.averaging is not None:
        key = "vision.ema" if config.task == "vision" and config.vision.ema else "average.last"
        raise BellboxError(
            f"distributed.mode is fsdp, and {key} keeps a second model whole; take ddp, or {key} 0"
        )
