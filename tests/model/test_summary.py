"""What a run says of its adapters: idle layers, layers skipped at random, and what PEFT directories leave out."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, convert, inject, save_peft
from lightning_lora.model.summary import drops_layers, outside_names, skipped_at_random
from tests import models, runs, zoo
from tests.runs import LanguageModule, loader, trainer

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


class Scored(LanguageModule):
    """A head and a temperature of the user's beside the pretrained model, and a teacher that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 1))
        self.temperature = nn.Parameter(torch.ones(()))
        self.teacher = nn.Linear(2, 2).requires_grad_(False)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "holds the adapter alone" in record.message]


def saved(directory: Path, module: LanguageModule, **settings: bool) -> Path:
    callback = ModelCheckpoint(directory, filename="{step}", save_top_k=-1)
    trainer(directory, LoRACallback(r=4, **settings), callback, max_epochs=2).fit(module, loader())
    return max(directory.glob("*.ckpt"))


def test_save_peft_of_a_module_names_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    module = Scored()
    inject(module.model, LoRAConfig(r=4))
    with caplog.at_level("INFO"):
        save_peft(module, tmp_path / "adapter")
        (line,) = said(caplog)
        save_peft(module.model, tmp_path / "of the model itself")
    assert line.startswith(f"{tmp_path / 'adapter'} holds the adapter alone")
    assert "outside the adapted model, temperature, head. Save the state_dict() of those beside it" in line
    assert len(said(caplog)) == 1


def test_convert_names_it_and_the_file_that_holds_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = saved(tmp_path, Scored())
    with caplog.at_level("INFO"):
        convert(path, tmp_path / "converted")
    (line,) = said(caplog)
    assert line.startswith(f"{tmp_path / 'converted'} holds the adapter alone")
    assert line.endswith(f"temperature, head. It is in {path}, under 'state_dict'")
    assert {"temperature", "head.0.weight"} <= torch.load(path)["state_dict"].keys()


def test_a_run_with_save_peft_names_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        saved(tmp_path, Scored(), save_peft=True)
    assert len(list(tmp_path.glob("*-peft"))) == 2
    (line,) = said(caplog)
    first = min(tmp_path.glob("*.ckpt"))
    assert line.startswith(str(first).removesuffix(".ckpt") + "-peft holds the adapter alone")
    assert line.endswith(f"temperature, head. It is in {first}, under 'state_dict'")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        path = saved(tmp_path, LanguageModule(), save_peft=True)
        convert(path, tmp_path / "converted")
        save_peft(inject(models.encoder(), LoRAConfig(r=2, target_modules=["head"])), tmp_path / "adapter")
    assert said(caplog) == []


def test_names_are_outermost_and_do_not_hold_the_model():
    names = ["net.model.q.lora_A", "net.head.0.weight", "net.head.0.bias", "scale", "net.model_b.weight"]
    assert outside_names(names, "net.model") == ["net.head", "scale", "net.model_b"]
    assert outside_names(names, "") == []
