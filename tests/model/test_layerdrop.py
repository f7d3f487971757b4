"""Layers that are skipped at random: which ones they are, and that nobody calls them idle."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, inject
from lightning_lora.model.summary import drops_layers, skipped_at_random
from tests import runs, zoo

TOWERS = {
    "whisper": ({"encoder_layerdrop": 1.0}, {"model.encoder"}),
    "wav2vec2": ({"layerdrop": 1.0}, {"wav2vec2.encoder"}),
}


class Speech(pl.LightningModule):
    """Skips every layer of a transformers model that ``layerdrop`` may skip."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.family = next(family for family in zoo.FAMILIES if family.name == name)
        self.model = self.family.build().train()
        for key, value in TOWERS[name][0].items():
            setattr(self.model.config, key, value)
        for part in self.model.modules():
            if name == "whisper" and type(part).__name__ == "WhisperEncoder":
                part.layerdrop = 1.0  # as its config said when it was built

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.family.output(self.model(**self.family.inputs())).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(directory: Path, module: pl.LightningModule) -> None:
    trainer = runs.trainer(directory, LoRACallback(r=2, strict_idle=True), max_steps=1)
    trainer.fit(module, DataLoader(torch.zeros(1), batch_size=1))


@pytest.mark.parametrize("name", TOWERS)
def test_layers_that_are_skipped_at_random_are_not_called_idle(tmp_path: Path, name: str) -> None:
    module = Speech(name)
    fit(tmp_path, module)
    assert set(drops_layers(module.model)) == TOWERS[name][1]
    skipped = skipped_at_random(module.model)
    assert skipped
    assert all(layer.startswith(f"{tower}.layers.") for layer in skipped for tower in TOWERS[name][1])


def test_a_layer_beside_them_is_still_called_idle(tmp_path: Path) -> None:
    class Unheard(Speech):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model.model.decoder.layers[0].fc1(torch.ones(1, self.model.config.d_model)).sum()

    module = Unheard.__new__(Unheard)
    Speech.__init__(module, "whisper")
    with pytest.raises(ValueError, match=r"adapted layers got no gradient in the first step: model\.decoder"):
        fit(tmp_path, module)


def test_without_layerdrop_nothing_is_skipped() -> None:
    model = inject(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)), LoRAConfig(r=1))
    assert drops_layers(model) == {}
    assert skipped_at_random(model) == set()
