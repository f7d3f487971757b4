"""LoRA+'s groups on two gloo ranks against one process, under ``ddp``, ``fsdp_lora`` and ``megatron_lora``."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import FSDPLoRAStrategy, MegatronLoRAStrategy, parameter_groups
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.training import (
    EXACT,
    SHARDED,
    STEP_TOLERANCE,
    Recorded,
    alone,
    fit,
    from_all_ranks,
    rank_loader,
    rank_of,
    state,
)

STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp_lora": lambda: FSDPLoRAStrategy(**SHARDED),
    "adapters in shards": lambda: FSDPLoRAStrategy(shard_adapters=True, **SHARDED),
    "megatron_lora": lambda: MegatronLoRAStrategy(tensor_parallel_size=2),
}
LORA = {"modules_to_save": ["norm"]}  # a vector that learns as fast as B


class Grouped(Recorded):
    """Trains in LoRA+'s groups, under a schedule that warms up."""

    def __init__(self) -> None:
        super().__init__()
        self.model = four_heads().train()

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self, 2e-3, lora_plus_ratio=5.0, weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups, eps=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 3, 1.0))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(name: str, **settings: Any) -> Grouped:
    module = Grouped()
    rank, num_ranks = (0, 1) if name == "megatron_lora" else rank_of()  # its ranks share a model, and see all rows
    data = {"train_dataloaders": rank_loader(rank, num_ranks)}
    fit(None, module, STRATEGIES[name](), lora=LORA, loaders=data, **settings)
    return module


def members(module: Grouped) -> list[tuple[str, list[str], float]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = module.trainer.optimizers[0].param_groups
    return [(group["name"], [names[id(one)] for one in group["params"]], group["lr"]) for group in groups]


THREE_STEPS = {"max_steps": 3, "max_epochs": None}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Return what three steps on one process come to."""
    module = alone(Grouped(), lora=LORA, **THREE_STEPS)
    return {"adapters": state(module), "members": members(module)}


@pytest.mark.parametrize("name", STRATEGIES)
@on_ranks(2)
def test_three_steps_equal_one_process(name: str, single: dict[str, Any]) -> None:
    module = train(name, **THREE_STEPS)
    assert members(module) == single["members"]
    torch.testing.assert_close(state(module), single["adapters"], **STEP_TOLERANCE)
    torch.testing.assert_close(*from_all_ranks(state(module)), **EXACT)


@pytest.fixture(scope="module")
def straight(directory: Path) -> dict[str, Any]:
    """Return what two epochs on one process come to, and leave a file of each."""
    module = alone(Grouped(), directory, lora=LORA, max_epochs=2)
    return {"adapters": state(module), "members": members(module)}


@pytest.mark.parametrize("name", ["adapters in shards", "megatron_lora"])
@on_ranks(2)
def test_a_file_of_one_process_resumes_in_its_groups(name: str, directory: Path, straight: dict[str, Any]) -> None:
    module = train(name, ckpt_path=directory / "epoch=0.ckpt", max_epochs=2)
    assert len(module.losses) == 4
    assert members(module) == straight["members"]
    torch.testing.assert_close(state(module), straight["adapters"], **STEP_TOLERANCE)
