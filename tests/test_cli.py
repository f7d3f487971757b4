"""LightningCLI: the callback from YAML, and back."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_lora import LoRAConfig
from tests import models
from tests.runs import LanguageModule, loader, same_adapters

CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_lora.LoRACallback
      init_args:
        r: 4
        target_modules: [q_proj, v_proj]
        rank_pattern: {q_proj: 2}
        dropout: 0.1
"""


class Base(pl.LightningModule):
    """What a command line names subclasses of."""


class Chosen(Base, LanguageModule):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model = models.llama(layers=layers)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()


def command(directory: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> LightningCLI:
    class Module(LanguageModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader()

    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["cli", *arguments])
    return LightningCLI(Module, seed_everything_default=0)


def test_yaml_configures_the_callback_and_is_written_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "input.yaml").write_text(CONFIG + f"  default_root_dir: {tmp_path}\n")
    cli = command(tmp_path, monkeypatch, ["fit", "--config", "input.yaml"])
    wanted = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, dropout=0.1)
    assert cli.model.model.lora_injection.config == wanted
    written = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]["trainer"]["callbacks"][0]
    again = yaml.safe_load(CONFIG)["trainer"]["callbacks"][0]
    assert written["class_path"] == again["class_path"]
    assert again["init_args"].items() <= written["init_args"].items()


def test_arguments_of_the_command_line_configure_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "fit",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=1",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.callbacks+=lightning_lora.LoRACallback",
        "--trainer.callbacks.r=3",
    ]
    cli = command(tmp_path, monkeypatch, arguments)
    assert cli.model.model.lora_injection.config.r == 3


def test_settings_of_the_file_count_where_yaml_spells_the_defaults_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "input.yaml").write_text(CONFIG + f"  default_root_dir: {tmp_path}\n")
    first = command(tmp_path, monkeypatch, ["fit", "--config", "input.yaml"])
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    content = yaml.safe_load((tmp_path / "input.yaml").read_text())
    content["trainer"]["callbacks"][0]["init_args"] = {"init_from": "first.ckpt", "dropout": 0.5}
    (tmp_path / "warm.yaml").write_text(yaml.safe_dump(content))
    cli = command(tmp_path, monkeypatch, ["fit", "--config=warm.yaml", "--trainer.default_root_dir=warm"])
    assert "r: 8\n" in (tmp_path / "warm" / "config.yaml").read_text()
    saved = ["fit", "--config=warm/config.yaml", "--trainer.default_root_dir=again"]
    with caplog.at_level("INFO"):
        again = command(tmp_path, monkeypatch, saved)
    wanted = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, dropout=0.5)
    assert cli.model.model.lora_injection.config == again.model.model.lora_injection.config == wanted
    assert any(
        "LoRA starts from first.ckpt: r=4, dropout=0.5, target_modules=['q_proj', 'v_proj']" in record.message
        for record in caplog.records
    )
    with pytest.raises(ValueError, match="the model has r=16"):
        command(tmp_path, monkeypatch, [*saved, "--trainer.callbacks.r=16"])


def test_a_file_of_a_subclass_that_the_command_line_named_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "fit", f"--model={__name__}.Chosen", "--model.layers=1",
        "--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--trainer.callbacks+=lightning_lora.LoRACallback", "--trainer.callbacks.r=3",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["cli"])
    cli = LightningCLI(Base, Data, subclass_mode_model=True, seed_everything_default=0, args=arguments)
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    for cls in (Base, Chosen):
        loaded = cls.load_from_checkpoint(tmp_path / "cli.ckpt")
        assert type(loaded) is Chosen
        assert same_adapters(loaded, cli.model)
