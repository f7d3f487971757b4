"""Checkpoints of several named adapters: resumed exactly, with more or fewer adapters, and compared one by one."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    active,
    adapter_checkpoint,
    adapter_state_dict,
    adapters,
    add_adapter,
    inject,
    load_adapter_state_dict,
    named_adapter_parameters,
)
from tests import models, runs

CONFIGS = {
    "law": LoRAConfig(r=4, dropout=0.2),
    "medicine": LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], dropout=0.1),
    "code": LoRAConfig(r=3, use_dora=True, target_modules=["up_proj", "down_proj"]),
}
MORE = {"tax": LoRAConfig(r=1)}
# who acts in each epoch of one batch: their numbers of steps differ, and some have none in a window
ACTING = [["law", "medicine", None, "law"], ["law"] * 4, ["code", "law", "law", "code"], "medicine"]


class Module(pl.LightningModule):
    """Lets other adapters act in every epoch, and keeps its losses."""

    configs = CONFIGS

    def __init__(self) -> None:
        super().__init__()
        self.model = models.llama()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        acting = ACTING[self.current_epoch % len(ACTING)]
        known = (
            [name if name in adapters(self.model) else None for name in acting] if isinstance(acting, list) else acting
        )
        if known == [None] * 4:
            return None  # all rows are of an adapter that is gone
        with active(self.model, known):
            loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Grouped(Module):
    """Each adapter has a group of the optimizer, and a learning rate of its own."""

    def configure_optimizers(self) -> Any:
        rates = {"law": 1e-2, "medicine": 2e-2, "code": 3e-2, "tax": 4e-2}
        named = dict(named_adapter_parameters(self))
        groups = []
        for name in adapters(self.model):
            own = [p for key, p in named.items() if f".lora.{name}." in key]
            groups += [{"params": params, "lr": rates[name], "adapter": name} for params in (own, [])]
        optimizer = torch.optim.AdamW(groups)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0, 1)
        schedules = [warm, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))]
        return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, [1])]


def fit(
    directory: Path, module: Module, names: Any = tuple(CONFIGS), epochs: int = 8, ckpt_path: Any = None
) -> pl.Trainer:
    lora = LoRACallback(adapters={name: (CONFIGS | MORE)[name] for name in names})
    saving = ModelCheckpoint(directory, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    trainer = runs.trainer(directory, lora, saving, max_epochs=epochs)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def loader() -> "DataLoader[Tensor]":
    return DataLoader(models.token_ids(4, 8, seed=1), batch_size=4)


def held(module: Module) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Return every adapter tensor with what the optimizer keeps of it."""
    (optimizer,) = module.trainer.optimizers
    return {name: (p.detach(), optimizer.state[p]) for name, p in named_adapter_parameters(module)}


def steps(module: Module) -> dict[str, float]:
    """Return how many steps each adapter took."""
    found = {name: float(state["step"]) if state else 0.0 for name, (_, state) in held(module).items()}
    by_adapter = {name: {n for key, n in found.items() if f".lora.{name}." in key} for name in adapters(module.model)}
    assert all(len(numbers) == 1 for numbers in by_adapter.values())
    return {name: numbers.pop() for name, numbers in by_adapter.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, Path]:
    directory = tmp_path_factory.mktemp("straight")
    torch.manual_seed(0)
    module = Module()
    fit(directory, module)
    return module, directory


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_a_resume_is_exact_for_adapters_at_different_steps(
    straight: tuple[Module, Path], step: int, tmp_path: Path
) -> None:
    expected, directory = straight
    torch.manual_seed(99)
    module = Module()
    fit(tmp_path, module, ckpt_path=directory / f"step={step}.ckpt")
    assert module.losses == expected.losses[step:]
    assert steps(module) == steps(expected) == {"law": 6.0, "medicine": 4.0, "code": 2.0}
    for name, (value, state) in held(expected).items():
        own, own_state = held(module)[name]
        assert torch.equal(own, value)
        assert all(torch.equal(own_state[key], state[key]) for key in state)


def test_an_adapter_that_has_not_stepped_has_no_state(straight: tuple[Module, Path], tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, epochs=4, ckpt_path=straight[1] / "step=4.ckpt")  # which is the end
    assert steps(module) == {"law": 3.0, "medicine": 2.0, "code": 1.0}
    fit(tmp_path / "more", module := Module(), epochs=4, ckpt_path=straight[1] / "step=2.ckpt")
    saved = torch.load(straight[1] / "step=2.ckpt", weights_only=True)
    names, states = saved["lightning_lora"]["optimizers"][0][0], saved["optimizer_states"][0]["state"]
    assert {".lora.code." in names[index] for index in states} == {False}
    assert steps(module)["code"] == 1.0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("kind", [Module, Grouped])
def test_adapters_are_added_and_dropped_on_resume(
    kind: type[Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, resumed = kind(), kind()
    fit(tmp_path / "whole", whole, ["law", "medicine", "code"])
    start = dict(named_adapter_parameters(add_adapter(models.llama(), "tax", MORE["tax"])))
    fit(tmp_path, resumed, ["code", "tax", "medicine"], ckpt_path=tmp_path / "whole" / "step=4.ckpt")
    assert "'tax' only in the model, kept as it is there; 'law' only in the file, left out" in caplog.text
    assert steps(resumed) == {"code": 2.0, "tax": 0.0, "medicine": 4.0}
    expected = held(whole)
    for name, (value, state) in held(resumed).items():
        if ".lora.tax." in name:
            assert torch.equal(value, start[name])
            continue
        torch.testing.assert_close(value, expected[name][0], rtol=1e-5, atol=1e-7)  # other rows beside its own
        torch.testing.assert_close(state, expected[name][1], rtol=1e-4, atol=1e-8)
    if kind is Grouped:
        rates = {group["adapter"]: group["lr"] for group in whole.trainer.optimizers[0].param_groups}
        own = {group["adapter"]: group["lr"] for group in resumed.trainer.optimizers[0].param_groups}
        assert own == {"code": rates["code"], "tax": pytest.approx(4 * rates["law"]), "medicine": rates["medicine"]}


@pytest.mark.parametrize(
    "other", [LoRAConfig(r=5), LoRAConfig(r=4, alpha=1), LoRAConfig(r=4, target_modules=["q_proj"])]
)
def test_another_config_for_one_name_is_an_error_before_anything_is_copied(other: LoRAConfig) -> None:
    checkpoint = adapter_checkpoint(model_with(CONFIGS))
    model = model_with({**CONFIGS, "law": other}, seed=1)
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    with pytest.raises(ValueError, match="adapter 'law' in the checkpoint"):
        load_adapter_state_dict(model, checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state_dict(model).items())


def model_with(configs: dict[str, LoRAConfig], seed: int = 0) -> nn.Module:
    model = models.llama()
    for name, config in configs.items():
        add_adapter(model, name, config)
    models.fill_adapters(model, seed=seed)
    return model


@pytest.mark.parametrize("as_checkpoint", [True, False])
def test_a_state_is_loaded_by_name(as_checkpoint: bool, caplog: pytest.LogCaptureFixture) -> None:
    source, model = model_with(CONFIGS), model_with({"code": CONFIGS["code"], "new": LoRAConfig(r=1)}, seed=1)
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    state = adapter_checkpoint(source) if as_checkpoint else adapter_state_dict(source)
    load_adapter_state_dict(model, state)
    for name, value in adapter_state_dict(model).items():
        assert torch.equal(value, before[name] if ".lora.new." in name else adapter_state_dict(source)[name])
    assert "'new' only in the model, kept as it is there; 'law', 'medicine' only in the file" in caplog.text


def test_adapters_with_and_without_names_are_not_mixed_up() -> None:
    named, plain = model_with(CONFIGS), inject(models.llama(), CONFIGS["law"])
    for state in (adapter_checkpoint, adapter_state_dict):
        with pytest.raises(
            ValueError, match="holds adapters named 'code', 'law', 'medicine', and LlamaForCausalLM has an"
        ):
            load_adapter_state_dict(plain, state(named))
        with pytest.raises(
            ValueError, match=r"holds an adapter without a name.*load_peft\(model, directory, adapter=name"
        ):
            load_adapter_state_dict(named, state(plain))
    with pytest.raises(ValueError, match="holds adapters named 'law', and LlamaForCausalLM has adapters named 'other'"):
        load_adapter_state_dict(
            model_with({"other": CONFIGS["law"]}), adapter_checkpoint(model_with({"law": CONFIGS["law"]}))
        )


def test_a_file_that_lacks_a_tensor_of_one_adapter_is_refused() -> None:
    model = model_with(CONFIGS)
    checkpoint = adapter_checkpoint(model)
    for lost in ([".lora.law.", "0.self_attn.q_proj"], [".lora.law."]):
        state = {name: v for name, v in checkpoint["state_dict"].items() if not all(part in name for part in lost)}
        with pytest.raises(ValueError, match=r"lora\.law\.lora_A', .*missing in the file"):
            load_adapter_state_dict(model, {**checkpoint, "state_dict": state})


def test_nan_in_one_adapter_is_named() -> None:
    source = model_with(CONFIGS)
    dict(named_adapter_parameters(source))["model.layers.1.self_attn.v_proj.lora.medicine.lora_B"].data.fill_(torch.nan)
    with pytest.warns(UserWarning, match=r"v_proj\.lora\.medicine\.lora_B' holds NaN"):
        checkpoint = adapter_checkpoint(source)
    with pytest.raises(ValueError, match=r"v_proj\.lora\.medicine\.lora_B' holds NaN"):
        load_adapter_state_dict(model_with(CONFIGS), checkpoint)


def test_a_file_of_a_trainer_goes_on_in_fabric(straight: tuple[Module, Path], tmp_path: Path) -> None:
    expected, directory = straight
    fabric = Fabric(accelerator="cpu", devices=1)

    def begun() -> dict[str, Any]:
        model = model_with(CONFIGS, seed=5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = fabric.setup(model, optimizer)
        return {"model": model, "optimizer": optimizer}

    state = begun()
    fabric.load(directory / "step=8.ckpt", state, strict=False)
    fabric.save(tmp_path / "own.ckpt", state)
    for loaded in (state, begun()):
        if loaded is not state:
            fabric.load(tmp_path / "own.ckpt", loaded)
        parameters = dict(named_adapter_parameters(loaded["model"]))
        for name, (value, moments) in held(expected).items():
            own = parameters[name.removeprefix("model.")] if name not in parameters else parameters[name]
            assert torch.equal(own, value)
            assert all(torch.equal(loaded["optimizer"].state[own][key], moments[key]) for key in moments)


def test_load_from_checkpoint_gives_all_adapters(straight: tuple[Module, Path]) -> None:
    expected, directory = straight
    module = Module.load_from_checkpoint(directory / "step=8.ckpt")
    assert adapters(module.model) == CONFIGS
    assert runs.same_adapters(module, expected)
