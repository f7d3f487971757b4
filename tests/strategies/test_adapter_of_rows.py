"""``LoRACallback(adapters=..., adapter_key=...)``: a batch names the adapters of its rows."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, active, adapters, losses_by_adapter, named_adapter_parameters
from tests import models

CONFIGS = {"law": LoRAConfig(r=4), "medicine": LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])}
NAMES = ["law", "medicine", "law", "medicine"]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = models.llama()
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        ids = batch["ids"]
        logits = self.model(ids).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        by_adapter = losses_by_adapter(losses, batch["adapter"])
        self.seen.append({name: float(loss.detach()) for name, loss in by_adapter.items()})
        return torch.stack([*by_adapter.values()]).sum()

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.seen.append(self.model(batch["ids"]).logits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def samples(as_names: bool = True, names: list[str] = NAMES) -> list[dict[str, Any]]:
    ids = models.token_ids(rows=len(names), columns=6)
    keys = names if as_names else [list(CONFIGS).index(name) for name in names]
    return [{"ids": row, "adapter": key} for row, key in zip(ids, keys, strict=True)]


def fit(module: Module, data: list[dict[str, Any]], callback: LoRACallback, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=2, callbacks=[callback], **quiet, **options)
    trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=2))
    return trainer


@pytest.mark.parametrize("as_names", [True, False])
def test_a_batch_names_the_adapters_of_its_rows(as_names: bool) -> None:
    module = Module()
    fit(module, samples(as_names), LoRACallback(adapters=CONFIGS, adapter_key="adapter"), num_sanity_val_steps=0)
    assert list(adapters(module)) == list(CONFIGS)
    for name, config in CONFIGS.items():
        own = Module()
        data = [one for one, other in zip(samples(), NAMES, strict=True) if other == name]
        fit(own, data, LoRACallback(adapters={name: config}, adapter_key="adapter"), num_sanity_val_steps=0)
        values = dict(named_adapter_parameters(module))
        for key, parameter in named_adapter_parameters(own):
            torch.testing.assert_close(values[key], parameter, rtol=1e-4, atol=1e-5)
    with active(module, "law"):  # the run left its choice
        module.model(models.token_ids())
    with pytest.raises(ValueError, match="none was chosen"):
        module.model(models.token_ids())


def test_a_batch_that_names_no_adapters_is_an_error() -> None:
    data = [{"ids": one["ids"]} for one in samples()]
    with pytest.raises(ValueError, match=r"a batch of keys \['ids'\] does not name the adapters"):
        fit(Module(), data, LoRACallback(adapters=CONFIGS, adapter_key="adapter"))


def test_settings_beside_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="leave r out"):
        LoRACallback(adapters=CONFIGS, r=4)
    with pytest.raises(ValueError, match="leave config out"):
        LoRACallback(LoRAConfig(), adapters=CONFIGS)
    with pytest.raises(ValueError, match="chooses among adapters with names"):
        LoRACallback(adapter_key="adapter")
    with pytest.raises(ValueError, match="letters, digits"):
        LoRACallback(adapters={"a/b": LoRAConfig()})
    with pytest.raises(TypeError, match="must be a LoRAConfig"):
        LoRACallback(adapters={"a": {"r": 8}})


def test_losses_are_means_of_own_rows_and_labels() -> None:
    losses = torch.arange(8.0).view(4, 2)
    found = losses_by_adapter(losses, ["a", None, "b", "a"])
    assert {name: float(loss) for name, loss in found.items()} == {"a": 3.5, "b": 4.5}
    counts = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 1]]).bool()
    found = losses_by_adapter(losses, torch.tensor([0, -1, 1, 0]), counts=counts)
    assert {place: float(loss) for place, loss in found.items()} == {0: pytest.approx(13 / 3), 1: 0.0}
    packed = losses_by_adapter(losses.flatten(), ["a", None, "b"], lengths=[3, 4, 1])
    assert {name: float(loss) for name, loss in packed.items()} == {"a": 1.0, "b": 7.0}
    for wrong in (["a"], ["a"] * 5):
        with pytest.raises(ValueError, match="other rows than"):
            losses_by_adapter(losses, wrong)
    with pytest.raises(ValueError, match="do not fit losses"):
        losses_by_adapter(losses, ["a"] * 4, counts=counts[0])
