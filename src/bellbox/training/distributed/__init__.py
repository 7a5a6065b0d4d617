"""Several processes that train one model: who they are (`world`), and how they share it (`parallel`)."""

from bellbox.training.distributed.parallel import Parallel
from bellbox.training.distributed.world import World, launched_rank, leave, speaks_for_all, start

__all__ = ["Parallel", "World", "launched_rank", "leave", "speaks_for_all", "start"]
