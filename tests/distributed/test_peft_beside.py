"""``save_peft=True`` on two ranks: the directory beside a file holds what the file holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_lora import FSDPLoRAStrategy, LoRACallback, MegatronLoRAStrategy
from tests import models
from tests.distributed.ranks import on_ranks
from tests.runs import LanguageModule, loader, trainer


def train(directory: Path, module: pl.LightningModule, *callbacks: Any, lora: dict[str, Any], **settings: Any) -> None:
    callback = ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}")
    ours = LoRACallback(r=2, save_peft=True, **lora)
    trainer(directory, ours, *callbacks, callback, devices=2, max_epochs=2, **settings).fit(module, loader())


def assert_directories_hold_what_files_hold(directory: Path) -> None:
    ids = models.token_ids()
    for epoch in (0, 1):
        saved = LanguageModule.load_from_checkpoint(directory / f"epoch={epoch}.ckpt").model
        read = peft.PeftModel.from_pretrained(models.llama(), directory / f"epoch={epoch}-peft")
        torch.testing.assert_close(read(input_ids=ids).logits, saved(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


@on_ranks(2)
def test_a_directory_holds_averaged_adapters_as_its_file_does(tmp_path: Path) -> None:
    averaging = EMAWeightAveraging(decay=0.9)
    lora = {"modules_to_save": ["lm_head"], "use_dora": True}
    train(tmp_path, LanguageModule(), averaging, lora=lora, strategy="ddp")
    assert_directories_hold_what_files_hold(tmp_path)


class Halving(LanguageModule):
    """Writes half of every B."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state |= {name: value / 2 for name, value in state.items() if name.endswith("lora_B")}


STRATEGIES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "whole": (FSDPLoRAStrategy, ["lm_head"]),
    "sharded": (lambda: FSDPLoRAStrategy(shard_adapters=True), ["lm_head"]),
    "split": (lambda: MegatronLoRAStrategy(tensor_parallel_size=2), []),
}


@pytest.mark.parametrize("name", STRATEGIES)
@on_ranks(2)
def test_a_directory_holds_what_a_module_changed_in_its_file(tmp_path: Path, name: str) -> None:
    strategy, heads = STRATEGIES[name]
    train(tmp_path, Halving(), lora={"modules_to_save": heads}, strategy=strategy())
    assert_directories_hold_what_files_hold(tmp_path)


class Dilated(pl.LightningModule):
    """Has a layer whose adapter PEFT cannot express."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 4, 3, dilation=2)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.convolution(batch[:, :, None].float().expand(-1, -1, 9)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@on_ranks(2)
def test_what_peft_cannot_express_is_an_error_on_every_rank(tmp_path: Path) -> None:
    words = r"PEFT convolves with lora_A of 'convolution' without the base's dilation=\(2,\)"
    with pytest.raises(ValueError, match=words):
        train(tmp_path, Dilated(), lora={"target_modules": ["convolution"]}, strategy="ddp")
