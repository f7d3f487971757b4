"""One rank of runs with ``LoRAAdamW`` under every strategy, and of runs that go on from their files."""

import os
import sys
from pathlib import Path
from typing import Any

from torch.optim import AdamW

from lightning_lora import FSDPLoRAStrategy, LoRAAdamW, MegatronLoRAStrategy
from lightning_lora.ops.sharded import is_sharded
from tests.distributed.launch import report
from tests.distributed.training import SHARDED, Recorded, fit, rank_loader, state

MAX_NORM = 0.05  # below the norm of every gradient of these runs


class Ours(Recorded):
    """Clips in its optimizer."""

    flat = True

    def configure_optimizers(self) -> Any:
        self.norms: list[float] = []
        optimizer = LoRAAdamW(self.parameters(), lr=1e-2, eps=1e-4, max_norm=MAX_NORM, flat=self.flat)
        optimizer.register_step_post_hook(lambda stepped, *_: self.norms.append(stepped.gradient_norm.item()))
        return optimizer


class Theirs(Recorded):
    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-2, eps=1e-4)


STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp_lora": lambda: FSDPLoRAStrategy(**SHARDED),
    "fsdp_lora, adapters in shards": lambda: FSDPLoRAStrategy(shard_adapters=True, **SHARDED),
    "megatron_lora": lambda: MegatronLoRAStrategy(tensor_parallel_size=2),
}
SETTINGS: dict[str, Any] = {"lora": {"modules_to_save": ["norm"]}, "limit_train_batches": 2}


def main(directory: Path) -> None:
    num_ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for name, build in STRATEGIES.items():
        # ranks that share a model see the same batches
        data = rank_loader(0, 1) if name == "megatron_lora" else rank_loader(rank, num_ranks)
        settings = {**SETTINGS, "loaders": {"train_dataloaders": data}, "max_epochs": 2}
        module = Ours()
        fit(directory / name, module, build(), **settings)
        resumed, switched, back = Ours(), Theirs(), Ours()
        path = directory / name / "epoch=0.ckpt"
        fit(None, resumed, build(), ckpt_path=path, **settings)
        fit(None, switched, build(), ckpt_path=path, gradient_clip_val=MAX_NORM, **settings)
        back.flat = False
        fit(None, back, build(), ckpt_path=directory / "single" / "epoch=0.ckpt", **settings)
        found[name] = {
            "adapters": state(module), "resumed": state(resumed), "switched": state(switched), "back": state(back),
            "norms": module.norms, "spread": sum(map(is_sharded, module.parameters())),
        }  # fmt: skip
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
