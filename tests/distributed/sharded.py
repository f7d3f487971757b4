"""``fsdp_lora`` in Fabric, and the share of a model that it shards."""

from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.fabric import FSDPLoRAStrategy
from lightning_lora.model.spread import gathered
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


def fill(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Shard an adapted model whose base is on meta; return its base, whole."""
    inject(model, LoRAConfig(r=2))
    start(**options).setup(model)
    assert any(is_sharded(parameter) for parameter in model.parameters())
    with gathered(model):
        state = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
    return {name: value for name, value in state.items() if ".lora_" not in name}
