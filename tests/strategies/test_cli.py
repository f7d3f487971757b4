"""LightningCLI: the callback from YAML, and back."""

import contextlib
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_lora import LoRACallback, LoRAConfig, named_adapter_parameters
from lightning_lora.model.base_form import quantization_of
from tests import models
from tests.runs import LanguageModule, loader, same_adapters, trainer

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


def test_yaml_quantises_the_base_and_is_written_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONFIG + "        quantize: nf4-dq\n        quantize_exclude: [o_proj]\n"
    (tmp_path / "input.yaml").write_text(text + f"  default_root_dir: {tmp_path}\n")
    cli = command(tmp_path, monkeypatch, ["fit", "--config", "input.yaml"])
    base = quantization_of(cli.model.model)
    assert (base.kind, base.exclude, len(base.layers)) == ("nf4-dq", ("o_proj",), 12)
    written = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]["trainer"]["callbacks"][0]
    again = yaml.safe_load(text)["trainer"]["callbacks"][0]
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


class Plain(Base):
    """Configures no optimizer."""

    training_step = LanguageModule.training_step

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.build()

    def build(self) -> None:
        self.model = models.llama()


class PlainLazy(Plain):
    def build(self) -> None:
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = models.llama()


ARGUMENTS = [
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false", "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--trainer.callbacks+=lightning_lora.LoRACallback", "--trainer.callbacks.r=4",
]  # fmt: skip


@pytest.mark.parametrize("name", ["Plain", "PlainLazy", "Chosen"])  # the last has its own configure_optimizers
def test_an_optimizer_and_scheduler_of_the_command_line_train_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["cli"])

    def run(*more: str) -> LightningCLI:
        arguments = [f"--model={__name__}.{name}", *ARGUMENTS, f"--trainer.default_root_dir={tmp_path}", *more]
        arguments += ["--model.layers=2"] if name == "Chosen" else []
        optimizer = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01", "--lr_scheduler=StepLR"]
        schedule = ["--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]
        return LightningCLI(
            Base, Data, subclass_mode_model=True, seed_everything_default=0, args=["fit", *arguments, *optimizer, *schedule],
            save_config_kwargs={"overwrite": True},
        )  # fmt: skip

    with pytest.warns(match="will be overridden by") if name == "Chosen" else contextlib.nullcontext():
        cli = run()
    written = LanguageModule()  # whose configure_optimizers says the same
    trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(written, loader())
    assert cli.model.losses == written.losses
    assert same_adapters(cli.model, written)
    (optimizer,) = cli.trainer.optimizers
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for _, parameter in named_adapter_parameters(cli.model)}
    (path,) = tmp_path.rglob("*.ckpt")
    with pytest.warns(match="will be overridden by") if name == "Chosen" else contextlib.nullcontext():
        resumed = run("--trainer.max_epochs=3", f"--ckpt_path={path}")
    trainer(tmp_path, LoRACallback(r=4), max_epochs=3).fit(written, loader(), ckpt_path=path)
    assert resumed.model.losses == written.losses[8:]


def test_an_optimizer_with_state_from_the_start_and_a_plateau_are_built_for_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

        def train_dataloader(self):
            return loader()

        val_dataloader = train_dataloader

    monkeypatch.setattr(sys, "argv", ["cli"])
    more = ["--optimizer=torch.optim.Adagrad", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val_loss"]
    cli = LightningCLI(
        Validated, seed_everything_default=0, args=["fit", *ARGUMENTS, f"--trainer.default_root_dir={tmp_path}", *more]
    )
    assert cli.model.losses[-1] < cli.model.losses[0]
    assert cli.trainer.lr_scheduler_configs[0].monitor == "val_loss"


def test_without_adapters_the_command_line_is_lightnings_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cli"])
    arguments = ["fit", *ARGUMENTS[:-2], f"--trainer.default_root_dir={tmp_path}", "--optimizer=torch.optim.SGD"]
    cli = LightningCLI(Plain, Data, seed_everything_default=0, args=arguments)
    (optimizer,) = cli.trainer.optimizers
    assert cli.model.configure_optimizers() is optimizer
    assert len(optimizer.param_groups[0]["params"]) == len(list(cli.model.parameters()))
