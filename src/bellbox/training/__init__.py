"""Training: a configuration in, a run folder out, which any kill leaves in a state to go on from.

`config` says what to train, `loop` does it, `run` opens what came out. Nothing here knows how a quantizer
works.
"""

from bellbox.runs.config import TrainConfig
from bellbox.runs.config_file import config_from_dict, load_config, save_config
from bellbox.runs.open import LoadedRun, load_run
from bellbox.training.loop import RunResult, Trainer, train

__all__ = [
    "LoadedRun",
    "RunResult",
    "TrainConfig",
    "Trainer",
    "config_from_dict",
    "load_config",
    "load_run",
    "save_config",
    "train",
]
