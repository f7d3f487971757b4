"""One of two ranks whose runs keep a PEFT directory beside every file: averages, a user's own change, a refusal."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_lora import FSDPLoRAStrategy, LoRACallback, MegatronLoRAStrategy
from tests.distributed.launch import report
from tests.runs import LanguageModule, loader, trainer


class Halving(LanguageModule):
    """Writes half of every B."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state |= {name: value / 2 for name, value in state.items() if name.endswith("lora_B")}


class Dilated(pl.LightningModule):
    """Has a layer whose adapter PEFT cannot express."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 4, 3, dilation=2)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.convolution(batch[:, :, None].float().expand(-1, -1, 9)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def train(directory: Path, module: pl.LightningModule, *callbacks: Any, lora: dict[str, Any], **settings: Any) -> None:
    callback = ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}")
    ours = LoRACallback(r=2, save_peft=True, **lora)
    trainer(directory, ours, *callbacks, callback, devices=2, max_epochs=2, **settings).fit(module, loader())


def main(directory: Path) -> None:
    whole = {"modules_to_save": ["lm_head"], "use_dora": True}
    train(directory / "ema", LanguageModule(), EMAWeightAveraging(decay=0.9), lora=whole, strategy="ddp")
    for name, strategy in (
        ("whole", FSDPLoRAStrategy()),
        ("sharded", FSDPLoRAStrategy(shard_adapters=True)),
        ("split", MegatronLoRAStrategy(tensor_parallel_size=2)),
    ):
        heads = [] if name == "split" else ["lm_head"]
        train(directory / name, Halving(), lora={"modules_to_save": heads}, strategy=strategy)
    message = ""
    try:
        train(directory / "refused", Dilated(), lora={"target_modules": ["convolution"]}, strategy="ddp")
    except ValueError as error:
        message = str(error)
    report(directory, {"refused": message})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
