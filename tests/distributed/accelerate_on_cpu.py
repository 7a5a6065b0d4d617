"""`examples/accelerate_fsdp.py` with accelerate's FSDP2 on CPUs, which its launcher has for GPUs alone."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import accelerate
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_fsdp.py"


class Sharding(Accelerator):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
        self.state.distributed_type = DistributedType.FSDP

    def unwrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.print("sharded:", all(hasattr(p, "device_mesh") for p in model.parameters()))
        return super().unwrap_model(model, *args, **kwargs)


accelerate.Accelerator = Sharding  # pyright: ignore[reportPrivateImportUsage]
sys.argv[0] = str(EXAMPLE)
runpy.run_path(str(EXAMPLE), run_name="__main__")
