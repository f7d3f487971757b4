"""Adapters that train together on ranks end where each would end in a run of its own in one process."""

from typing import Any

import pytest
import torch

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, MegatronLoRAStrategy
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.training import EXACT, SHARDED, from_all_ranks, rank_of
from tests.together import STEPS_OF, Together, alone, batches, configs, fit, outcome

STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp_lora": lambda: FSDPLoRAStrategy(**SHARDED),
    "adapters in shards": lambda: FSDPLoRAStrategy(shard_adapters=True, **SHARDED),
    "megatron_lora": lambda: MegatronLoRAStrategy(tensor_parallel_size=2),
}
RUNS = [("ddp", 2), ("fsdp_lora", 2), ("fsdp_lora", 4), ("adapters in shards", 2), ("megatron_lora", 2)]
# other order of sums
TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-6, "atol": 1e-6}}


def named(dtype: torch.dtype) -> dict[str, LoRAConfig]:
    return configs(adapter_dtype=str(dtype).removeprefix("torch."))


def together(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Train on this rank's rows; ranks that share a model see all of them."""
    rank, num_ranks = rank_of()
    data = batches() if name == "megatron_lora" else batches(rank, num_ranks)
    module = Together(four_heads().to(dtype).train())
    fit(module, named(dtype), data, STRATEGIES[name](), num_ranks)
    return outcome(module)


@pytest.fixture(scope="module")
def apart() -> dict[torch.dtype, Any]:
    return {dtype: alone(lambda dtype=dtype: four_heads().to(dtype).train(), named(dtype)) for dtype in TOLERANCES}


@pytest.mark.parametrize(("name", "num_ranks"), RUNS)
@on_ranks()
def test_ten_steps_together_equal_runs_apart(name: str, num_ranks: int, apart: dict[torch.dtype, Any]) -> None:
    for dtype, tolerance in TOLERANCES.items():
        found, expected = together(name, dtype), apart[dtype]
        for one in (found, expected):  # a rank's losses are of its own rows
            for adapter in one.values():
                adapter.pop("loss")
        torch.testing.assert_close(found, expected, **tolerance)
        steps = {key: int(found[key]["model.layers.0.mlp.up_proj.lora_A"][1]["step"]) for key in found}
        assert steps == STEPS_OF
        torch.testing.assert_close(*from_all_ranks(found)[:2], **EXACT)
