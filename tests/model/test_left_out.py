"""What trains outside the adapted model is named where a PEFT directory leaves it out."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, convert, inject, save_peft
from lightning_lora.model.summary import outside_names
from tests import models
from tests.runs import LanguageModule, loader, trainer


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
