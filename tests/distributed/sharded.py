"""``fsdp_lora`` in Fabric."""

from typing import Any

from lightning.fabric import Fabric
from torch import nn

from lightning_lora.fabric import FSDPLoRAStrategy
from lightning_lora.ops.sharded import is_sharded
from tests.distributed.training import rank_of

EVERYTHING = {"min_shard_numel": 0}


def start(**options: Any) -> Fabric:
    """Launch Fabric with the options of ``FSDPLoRAStrategy`` on all ranks."""
    fabric = Fabric(accelerator="cpu", devices=rank_of()[1], strategy=FSDPLoRAStrategy(**options))
    fabric.launch()
    return fabric


def share_in_shards(model: nn.Module) -> float:
    """Return the share of a model's parameters that is sharded."""
    num_sharded = sum(p.numel() for p in model.parameters() if is_sharded(p))
    return num_sharded / sum(p.numel() for p in model.parameters())
