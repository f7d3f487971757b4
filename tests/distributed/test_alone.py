"""``if trainer.is_global_zero: save_peft(...)`` on two gloo ranks: it works, or says that all ranks must call it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import FSDPLoRAStrategy, MegatronLoRAStrategy, adapter_state_dict, load_peft, save_peft
from lightning_lora.checkpoint import all_ranks
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, SHARDED, STEP_TOLERANCE, Recorded, alone, fit, rank_loader, rank_of, state

WHOLE: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp_lora": lambda: FSDPLoRAStrategy(**SHARDED),
    "megatron_lora, split over one rank": lambda: MegatronLoRAStrategy(tensor_parallel_size=1),
}
SPREAD: dict[str, Any] = {
    "fsdp_lora, adapters in shards": lambda: FSDPLoRAStrategy(shard_adapters=True, **SHARDED),
    "megatron_lora": lambda: MegatronLoRAStrategy(tensor_parallel_size=2),
}
STEPS = {"limit_train_batches": 3}


class Saving(Recorded):
    """Saves on rank 0 alone after the first batch, and on all ranks after the second."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.errors: list[str] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._try(lambda: save_peft(self.model, self.directory / "alone"))
            self._try(lambda: self.keep(adapter_state_dict(self.model)))
        if batch_idx == 1:
            self._try(lambda: save_peft(self.model, self.directory / "together"))
            assert (self.directory / "together" / "adapter_config.json").exists()
            self.together = {name: value.clone() for name, value in adapter_state_dict(self.model).items()}

    def keep(self, adapters: Any) -> None:
        self.alone = {name: value.clone() for name, value in adapters.items()}

    def _try(self, act: Any) -> None:
        try:
            act()
        except ValueError as error:
            self.errors.append(str(error))


def saved(directory: Path, strategy: str) -> Saving:
    all_ranks.PATIENCE_S = 2.0
    module, (rank, num_ranks) = Saving(str(directory)), rank_of()
    # ranks that share a model see the same batches
    data = rank_loader(0, 1) if strategy == "megatron_lora" else rank_loader(rank, num_ranks)
    fit(directory, module, (WHOLE | SPREAD)[strategy](), loaders={"train_dataloaders": data}, **STEPS)
    return module


def read(directory: Path) -> dict[str, Any]:
    return dict(adapter_state_dict(load_peft(models.llama(), directory)))


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Tensor]:
    return state(alone(**STEPS))


def assert_undisturbed(module: Saving, undisturbed: dict[str, Tensor]) -> None:
    """All ranks write together afterwards, and the run goes on as if nobody had asked."""
    torch.testing.assert_close(read(module.directory / "together"), module.together, **EXACT)
    torch.testing.assert_close(state(module), undisturbed, **STEP_TOLERANCE)


@pytest.mark.parametrize("strategy", WHOLE)
@on_ranks(2)
def test_rank_zero_writes_whole_adapters_alone(tmp_path: Path, undisturbed: dict[str, Tensor], strategy: str) -> None:
    module = saved(tmp_path, strategy)
    assert module.errors == []
    if rank_of()[0] == 0:
        torch.testing.assert_close(read(tmp_path / "alone"), module.alone, **EXACT)
    assert_undisturbed(module, undisturbed)


@pytest.mark.parametrize("strategy", SPREAD)
@on_ranks(2)
def test_rank_zero_alone_is_told_that_all_must_call_where_adapters_are_spread(
    tmp_path: Path, undisturbed: dict[str, Tensor], strategy: str
) -> None:
    module = saved(tmp_path, strategy)
    if rank_of()[0] == 0:
        first, second = module.errors
        assert "save_peft was called on rank 0, and not on rank 1 in time" in first
        assert "adapter_state_dict was called on rank 0, and not on rank 1 in time" in second
        assert "all ranks must call it" in first
    else:
        assert module.errors == []
    assert not (tmp_path / "alone").exists()
    assert_undisturbed(module, undisturbed)


@on_ranks(2)
def test_rank_zero_ends_after_the_others_have_met_it() -> None:
    """Its process keeps the store, and the test's body is the last thing that it does."""
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 0:
        time.sleep(0.2)
    else:
        all_ranks._POLL_S = 2.0  # it looks before rank 0 has called, and long after
    all_ranks.meet("this test")
