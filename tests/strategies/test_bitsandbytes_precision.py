"""Lightning's BitsandbytesPrecision: it replaces the base's layers under the adapters. On CPU its check is passed by."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision.bitsandbytes import BitsandbytesPrecision as FabricPlugin
from lightning.pytorch.plugins.precision.bitsandbytes import BitsandbytesPrecision as TrainerPlugin
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, inject, named_adapter_parameters
from lightning_lora.layers import LoRALayer
from lightning_lora.model.state import named_lora_layers
from tests import models
from tests.runs import LanguageModule, LazyModule, loader, same_adapters, trainer

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
LAYERS = 14


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles kernels for odd shapes."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Training(LanguageModule):
    """A module whose model is in train mode, in which bitsandbytes leaves its codes in their own order."""

    def on_train_start(self) -> None:
        self.model.train()


def run_with(directory: Path, plugin: Any, *callbacks: Any, **settings: Any) -> pl.Trainer:
    """Return a Trainer that was given the plugin after its check for CUDA."""
    run = trainer(directory, *callbacks, **settings)
    run.strategy.precision_plugin = plugin
    return run


def plugin(mode: str = "nf4", **settings: Any) -> TrainerPlugin:
    return TrainerPlugin(mode, dtype=torch.float32, **settings)


def reference(steps: int, **config: Any) -> list[float]:
    """Convert first and adapt then, by hand, and train."""
    module = LanguageModule()
    plugin(ignore_modules={"lm_head"}).convert_module(module.model)
    inject(module.model.to("cpu"), LoRAConfig(r=4, **config)).train()
    optimizer = torch.optim.AdamW([p for p in module.model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    while True:
        for batch in loader():
            if len(module.losses) == steps:
                return module.losses
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
        schedule.step()


HEAD = {"modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("order", "config"),  # Lightning takes no ignore_modules with configure_model
    [("callback", {}), ("inject", {}), ("callback", HEAD), ("inject", HEAD), ("configure_model", HEAD)],
)
def test_the_plugin_converts_the_base_under_the_adapters(tmp_path: Path, order: str, config: dict) -> None:
    class Lazy(Training, LazyModule):
        def configure_model(self) -> None:
            self.model = base

    base = models.llama()
    module = Lazy() if order == "configure_model" else Training()
    if order == "inject":
        inject(module.model, LoRAConfig(r=4, **config))
    own = plugin(ignore_modules=set() if config else {"model.lm_head"})
    run_with(tmp_path, own, LoRACallback(r=4, **config), max_epochs=2).fit(module, loader())
    layers = named_lora_layers(module.model)
    assert len(layers) == LAYERS
    assert all(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in layers.values())
    assert all(layer.weight.dtype == torch.uint8 for layer in layers.values())
    assert not isinstance(module.model.lm_head, bitsandbytes.nn.Linear4bit)
    assert own.ignore_modules == (set() if config else {"model.lm_head"})
    torch.testing.assert_close(module.losses, reference(8, **config), rtol=1e-5, atol=0)


def test_a_run_resumes_exactly(tmp_path: Path) -> None:
    def run(**settings: Any) -> Training:
        module = Training()
        path = settings.pop("ckpt_path", None)
        both = run_with(tmp_path, plugin(ignore_modules={"model.lm_head"}), LoRACallback(r=4), **settings)
        both.fit(module, loader(), ckpt_path=path)
        both.save_checkpoint(tmp_path / f"{both.max_epochs}.ckpt")
        return module

    whole, _ = run(max_epochs=2), run(max_epochs=1)
    resumed = run(max_epochs=2, ckpt_path=tmp_path / "1.ckpt")
    assert resumed.losses == whole.losses[4:]
    assert same_adapters(whole, resumed)


def test_fabric_converts_under_adapters_that_an_optimizer_holds() -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: id(parameter) for name, parameter in named_adapter_parameters(model)}
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric._strategy.precision = FabricPlugin("nf4", dtype=torch.float32, ignore_modules={"lm_head"})
    fabric._precision = fabric._strategy.precision
    wrapped, optimizer = fabric.setup(model, optimizer)
    assert {name: id(parameter) for name, parameter in named_adapter_parameters(model)} == before
    wrapped.train()
    losses = []
    for batch in loader():
        loss = wrapped(input_ids=batch, labels=batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(losses, reference(4), rtol=1e-5, atol=0)


def test_starting_values_and_trained_values_stay(tmp_path: Path) -> None:
    module = Training()
    inject(module.model, LoRAConfig(r=4, modules_to_save=["lm_head"], use_rslora=True, dropout=0.1))
    models.fill_adapters(module.model)
    with torch.no_grad():
        module.model.lm_head.weight.mul_(1.5)
    before = {name: value.clone() for name, value in module.model.named_parameters() if value.requires_grad}
    plain = module.model.lora_injection.originals["lm_head.weight"]
    callback = LoRACallback(r=4, modules_to_save=["lm_head"], use_rslora=True, dropout=0.1)
    run_with(tmp_path, plugin(), callback, max_steps=0).fit(module, loader())
    after = {name: value for name, value in module.model.named_parameters() if value.requires_grad}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert module.model.lora_injection.originals["lm_head.weight"] is plain


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: pl.Trainer(accelerator="cpu", plugins=plugin(), callbacks=LoRACallback(), logger=False),
            RuntimeError,
            "only supported on CUDA",
        ),
        (lambda: Fabric(accelerator="cpu", plugins=FabricPlugin("nf4")), RuntimeError, "only supported on CUDA"),
        (lambda: TrainerPlugin("int9"), KeyError, "int9"),
    ],
    ids=["trainer", "fabric", "other"],
)
def test_where_lightning_refuses_the_plugin_the_error_says_what_to_write(make: Any, error: type, match: str) -> None:
    inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoRAConfig(r=1, target_modules=["0"]))  # as before Fabric
    with pytest.raises(error, match=match) as caught:
        make()
    assert ('LoRACallback(quantize="nf4")' in str(caught.value)) == (error is RuntimeError)


def test_a_strategy_that_shards_says_what_to_write(tmp_path: Path) -> None:
    run = run_with(tmp_path, plugin(), LoRACallback(r=4))
    run.strategy.shards = True
    module = LanguageModule()
    with pytest.raises(ValueError, match=r'cannot shard the layers of BitsandbytesPrecision.*quantize="nf4"'):
        run.fit(module, loader())
    assert not any(isinstance(layer, LoRALayer) for layer in module.modules())


def test_other_errors_of_the_connectors_are_lightnings_own() -> None:
    with pytest.raises(ValueError) as caught:  # whatever Lightning says
        pl.Trainer(accelerator="nonsense")
    assert "lightning_lora" not in str(caught.value)


def test_layers_that_are_made_as_bitsandbytes_own_are_adapted(tmp_path: Path) -> None:
    class Lazy(pl.LightningModule):
        def configure_model(self) -> None:
            self.model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module, data = Lazy(), torch.utils.data.DataLoader(torch.randn(8, 64), batch_size=4)
    run_with(tmp_path, plugin(), LoRACallback(r=4), max_steps=2).fit(module, data)
    assert all(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in named_lora_layers(module).values())
    assert all(layer.lora_B.any() for layer in named_lora_layers(module).values())


def test_layers_that_are_bitsandbytes_already_are_left_alone(tmp_path: Path) -> None:
    module = Training()
    own = plugin(ignore_modules={"lm_head"})
    own.convert_module(module.model)
    layer: nn.Module = module.model.model.layers[0].self_attn.q_proj
    run_with(tmp_path, own, LoRACallback(r=4), max_steps=1).fit(module, loader())
    assert module.model.model.layers[0].self_attn.q_proj is layer
