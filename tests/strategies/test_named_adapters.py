"""Runs with several named adapters: PEFT directories beside their files, and what a run starts from."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    active,
    adapter_state_dict,
    adapters,
    add_adapter,
    load_peft,
    named_adapter_parameters,
    save_peft,
)
from tests import models, runs

CONFIGS = {"law": LoRAConfig(r=4, dropout=0.1), "medicine": LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])}


class Module(runs.LanguageModule):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        names = list(adapters(self.model))
        with active(self.model, [names[row % len(names)] for row in range(len(batch))]):
            return super().training_step(batch, batch_idx)


def fitted(directory: Path, **lora) -> Module:
    module, saving = Module(), ModelCheckpoint(directory, save_last=True, save_top_k=0)
    runs.trainer(directory, LoRACallback(**lora), saving).fit(module, runs.loader())
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, Path]:
    directory = tmp_path_factory.mktemp("trained")
    return fitted(directory, adapters=CONFIGS, save_peft=True), directory


class Untrained(Module):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def started(directory: Path, **lora) -> Module:
    module = Untrained()
    runs.trainer(directory, LoRACallback(**lora)).fit(module, runs.loader())
    return module


def test_each_adapter_has_a_directory_beside_the_checkpoint(trained: tuple[Module, Path], tmp_path: Path) -> None:
    module, directory = trained
    save_peft(module.model, tmp_path)
    for name in CONFIGS:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (directory / "last-peft" / name / file).read_bytes() == (tmp_path / name / file).read_bytes()
    read = load_peft(models.llama(), directory / "last-peft")
    assert runs.same_adapters(read, module.model)


def test_directories_go_with_the_checkpoint(tmp_path: Path) -> None:
    module, saving = Module(), ModelCheckpoint(tmp_path, monitor="epoch", mode="max", filename="{epoch}")
    lora = LoRACallback(adapters=CONFIGS, save_peft=True)
    runs.trainer(tmp_path, lora, saving, max_epochs=2).fit(module, runs.loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1-peft", "epoch=1.ckpt"]


@pytest.mark.parametrize("source", ["last.ckpt", "last-peft"])
def test_a_run_starts_from_all_adapters(trained: tuple[Module, Path], source: str, tmp_path: Path) -> None:
    module, directory = trained
    again = started(tmp_path, init_from=directory / source)
    assert runs.same_adapters(again.model, module.model)
    assert {name: config.r for name, config in adapters(again.model).items()} == {"law": 4, "medicine": 2}
    changed = started(tmp_path, init_from=directory / source, dropout=0.3)
    assert {config.dropout for config in adapters(changed.model).values()} == {0.3}
    assert runs.same_adapters(changed.model, module.model)
    with pytest.raises(ValueError, match="adapter 'law' in .* has r=4"):
        started(tmp_path, init_from=directory / source, r=3)


@pytest.mark.parametrize("source", ["last.ckpt", "last-peft"])
def test_given_adapters_start_from_the_file_if_it_has_them(
    trained: tuple[Module, Path], source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, directory = trained
    given = {"code": LoRAConfig(r=1), "medicine": CONFIGS["medicine"]}
    mixed = started(tmp_path, init_from=directory / source, adapters=given)
    assert list(adapters(mixed.model)) == ["code", "medicine"]
    theirs = adapter_state_dict(module.model)
    fresh = dict(named_adapter_parameters(add_adapter(models.llama(), "code", given["code"])))
    for name, value in adapter_state_dict(mixed.model).items():
        assert torch.equal(value, theirs[name] if ".lora.medicine." in name else fresh[name])
    assert "'code' only in the model, kept as it is there; 'law' only in the file, left out" in caplog.text


def test_a_second_fit_goes_on_with_what_the_first_started_from(trained: tuple[Module, Path], tmp_path: Path) -> None:
    _, directory = trained
    module, lora = Module(), LoRACallback(init_from=directory / "last.ckpt")
    runs.trainer(tmp_path, lora).fit(module, runs.loader())
    before = {name: value.clone() for name, value in adapter_state_dict(module.model).items()}
    runs.trainer(tmp_path, lora, max_steps=0).fit(module, runs.loader())
    assert all(torch.equal(value, before[name]) for name, value in adapter_state_dict(module.model).items())
