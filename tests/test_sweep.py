"""``Sweep``: every combination of a grid is an adapter, and the best one equals a run of its own."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, Sweep, adapters, named_adapter_parameters, parameter_groups
from tests import models

GRID = {"r": [2, 4], "lr": [1e-3, 1.5e-2]}
NAMES = ["r2-lr1e-3", "r2-lr15e-3", "r4-lr1e-3", "r4-lr15e-3"]


class Module(pl.LightningModule):
    """Written as for one adapter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = models.llama(dtype=dtype).train()
        self.num_rows: list[int] = []

    def training_step(self, batch: Any) -> Tensor:
        self.num_rows.append(len(batch["ids"]))
        assert len(batch["text"]) == len(batch["ids"])
        return self.model(input_ids=batch["ids"], labels=batch["ids"]).loss

    def validation_step(self, batch: Any) -> None:
        loss = self.model(input_ids=batch["ids"], labels=batch["ids"]).loss
        self.log("val_loss", loss, batch_size=len(batch["ids"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(parameter_groups(self, 1e-3, lora_plus_ratio=1.0), eps=1e-4)


def fit(module: Module, callback: Any, num_epochs: int = 3) -> pl.Trainer:
    data = [{"ids": models.token_ids(2, 6, seed=seed), "text": ["a", "b"]} for seed in range(3)]
    trainer = pl.Trainer(
        max_epochs=num_epochs, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))
    return trainer


def values(module: Module) -> dict[str, Tensor]:
    return {name.split(".lora")[0] + name[-7:]: p.detach() for name, p in named_adapter_parameters(module)}


@pytest.mark.parametrize("exact", [False, True])
def test_the_best_adapter_equals_a_run_of_its_own(exact: bool, tmp_path: Path) -> None:
    module, sweep = Module(), Sweep(grid=GRID, exact=exact, plot=tmp_path / "sweep.png")
    trainer = fit(module, sweep)
    assert list(sweep.results.history) == NAMES
    assert all(len(one) == 3 for one in sweep.results.history.values())
    assert {f"val_loss/{name}" for name in NAMES} <= set(trainer.callback_metrics)
    last = {name: one[-1][1] for name, one in sweep.results.history.items()}
    assert sweep.best_adapter == min(last, key=last.get)
    assert float(trainer.callback_metrics["val_loss"]) == min(last.values())
    assert (tmp_path / "sweep.png").stat().st_size > 5_000
    assert module.num_rows == ([2] * 36 if exact else [8] * 9)

    r, rate = {name: (r, lr) for name, (r, lr) in zip(NAMES, [(2, 1e-3), (2, 1.5e-2), (4, 1e-3), (4, 1.5e-2)], strict=True)}[sweep.best_adapter]  # fmt: skip
    assert list(adapters(module)) == [sweep.best_adapter]
    own = Module()
    own.configure_optimizers = lambda: torch.optim.AdamW(parameter_groups(own, rate, lora_plus_ratio=1.0), eps=1e-4)
    fit(own, LoRACallback(LoRAConfig(r=r)))
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
    torch.testing.assert_close(values(module), values(own), **tolerance)


def test_halving_drops_the_worse_ones_and_runs_them_no_more() -> None:
    module, sweep = Module(), Sweep(grid=GRID, halving=1)
    fit(module, sweep)
    assert module.num_rows == [8] * 3 + [4] * 3 + [2] * 3
    assert sorted(len(one) for one in sweep.results.history.values()) == [1, 1, 2, 3]
    assert sweep.results.remaining == [sweep.best_adapter]
    assert sweep.results.table().count("dropped") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": {}}, "must have values"),
        ({"grid": {"r": []}}, "must have values"),
        ({"grid": {"r": [2, 2]}}, "a combination twice"),
        ({"grid": GRID, "mode": "least"}, "'min' or 'max'"),
        ({"grid": GRID, "halving": 0}, "number of validations"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep(**arguments)
