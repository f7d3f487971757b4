"""One rank of runs whose rank 0 alone writes the adapter in the middle, as many scripts do under DDP."""

import os
import sys
from pathlib import Path
from typing import Any

from lightning_lora import FSDPLoRAStrategy, MegatronLoRAStrategy, adapter_state_dict, save_peft
from lightning_lora.checkpoint import all_ranks
from tests.distributed.ddp_script import Recorded, rank_loader
from tests.distributed.fsdp_script import SHARDED, fit, state
from tests.distributed.launch import report

STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp_lora": lambda: FSDPLoRAStrategy(**SHARDED),
    "fsdp_lora, adapters in shards": lambda: FSDPLoRAStrategy(shard_adapters=True, **SHARDED),
    "megatron_lora": lambda: MegatronLoRAStrategy(tensor_parallel_size=2),
}
SPREAD = tuple(STRATEGIES)[2:]


class Alone(Recorded):
    """Saves on one rank after the first batch, and on all after the second."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.errors: list[str] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._try(lambda: save_peft(self.model, self.directory / "alone"))
            self._try(lambda: self.keep(adapter_state_dict(self.model)))
        if batch_idx == 1:
            self._try(lambda: save_peft(self.model, self.directory / "together"))
            assert (self.directory / "together" / "adapter_config.json").exists()
            self.together = {name: value.clone() for name, value in adapter_state_dict(self.model).items()}

    def keep(self, adapters: Any) -> None:
        self.adapters = {name: value.clone() for name, value in adapters.items()}

    def _try(self, act: Any) -> None:
        try:
            act()
        except ValueError as error:
            self.errors.append(str(error))


def main(directory: Path) -> None:
    all_ranks.PATIENCE_S = 2.0
    found: dict[str, Any] = {}
    for name, build in STRATEGIES.items():
        where = directory / name
        module = Alone(str(where))
        # ranks that share a model see the same batches
        data = rank_loader(0, 1) if name == "megatron_lora" else rank_loader(int(os.environ["RANK"]), 2)
        fit(where, module, build(), loaders={"train_dataloaders": data}, limit_train_batches=3)
        found[name] = {
            "errors": module.errors, "alone": getattr(module, "adapters", None), "together": module.together,
            "ended": state(module),
        }  # fmt: skip
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
