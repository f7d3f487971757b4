"""What a rank holds at once while ``fsdp_lora`` streams a base of 1 GB into 4-bit shards on 2 CPU processes.

Every storage is counted, operator by operator, from the first weight that is read to the last; mapped files are not
held. The figures repeat on any machine.
"""

import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as mp
from lightning.fabric import Fabric
from memory import LiveStorage
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_lora import LoRAConfig, inject
from lightning_lora.distributed import sharding
from lightning_lora.fabric import FSDPLoRAStrategy
from lightning_lora.ops.sharded import is_sharded, local_part

PROCESSES = 2
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 9, "vocab_size": 16384}
TINY = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2048}
ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29527", "TORCHELASTIC_RUN_ID": "benchmark"}


class Held(LiveStorage):
    """The same without mapped files, which are told by their sizes; of a sharded tensor the local part."""

    def __init__(self, mapped_bytes: Collection[int]) -> None:
        self._mapped_bytes = mapped_bytes
        super().__init__([])

    def _see(self, tensor: Tensor) -> None:
        local = local_part(tensor)
        if not local.is_meta and local.untyped_storage().nbytes() not in self._mapped_bytes:
            super()._see(local)


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    """Count on every rank; ``rounds`` has no say."""
    config = LlamaConfig(num_attention_heads=16, num_key_value_heads=16, **(TINY if quick else LARGE))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="200MB")
        on_disk = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        mp.spawn(_worker, (base,), nprocs=PROCESSES)
        ranks = [json.loads((base / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return {"base": "bfloat16 on disk, nf4-dq in memory", "bytes_on_disk": on_disk, "ranks": ranks}


def _worker(rank: int, base: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    names |= {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update(ENVIRONMENT | {name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    (base / f"{rank}.json").write_text(json.dumps(_stream(base)))


def _stream(base: Path) -> dict[str, Any]:
    """Return bytes: the most that were held at once, this rank's share of the model, and the largest unit of shards."""
    held = Held({file.stat().st_size for file in base.glob("*.safetensors")})
    original = sharding.materialize

    def counted(*arguments: Any) -> None:
        with held:
            original(*arguments)

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base), dtype=torch.bfloat16)
    inject(model, LoRAConfig(r=8), quantize="nf4-dq")
    fabric = Fabric(accelerator="cpu", devices=PROCESSES, strategy=FSDPLoRAStrategy(base_weights=str(base)))
    fabric.launch()
    with mock.patch.object(sharding, "materialize", counted):
        fabric.setup(model)
    units = [*model.model.layers, model.model.embed_tokens, model.lm_head]
    own = sum(local_part(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))
    largest = max(map(_unit_bytes, units))
    return {"held": held.peak, "own_share": own, "largest_unit": largest, "ratio": held.peak / (own + largest)}


def _unit_bytes(unit: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in unit.parameters() if is_sharded(parameter))
