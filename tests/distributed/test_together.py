"""Adapters that train together on ranks end where each would end in a run of its own in one process."""

import functools
import operator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import (
    FSDPLoRAStrategy,
    LoRAConfig,
    MegatronLoRAStrategy,
    gpt_model,
    load_hf_weights,
    parameter_groups,
)
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.gpt import hugging_face
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.training import EXACT, SHARDED, from_all_ranks, rank_of
from tests.together import STEPS_OF, Together, alone, batches, configs, fit, loss_per_token, outcome

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


class Counted(Together):
    """Counts what each step gathers."""

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.traffic = counted_collectives()
        self.counts = self.traffic.__enter__()
        return super().training_step(batch)

    def on_after_backward(self) -> None:
        self.traffic.__exit__(None, None, None)
        self.__dict__.setdefault("gathered", []).append(sum(self.counts["all_gather"]))


@on_ranks(2)
def test_the_base_is_gathered_once_for_all_adapters() -> None:
    ids = models.token_ids(8, 6, seed=1)
    gathered = {}
    for number in (1, 8):
        names = [f"adapter{row % number}" for row in range(8)]
        module = Counted(four_heads().train())
        rates = dict.fromkeys(names, 1e-3)
        module.configure_optimizers = lambda module=module, rates=rates: torch.optim.AdamW(
            parameter_groups(module, rates)
        )
        named_ones = {name: LoRAConfig(r=2) for name in names}
        fit(module, named_ones, [{"ids": ids, "adapter": names}] * 3, FSDPLoRAStrategy(**SHARDED), 2)
        gathered[number] = module.gathered
    assert gathered[8] == gathered[1]
    assert min(gathered[1]) > 0


class OfMegatron(Together):
    """A ``GPTModel`` with the weights of Hugging Face's."""

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__(None)
        self.source, self.params_dtype = source, dtype

    def configure_model(self) -> None:
        if self.model is None:
            self.model = gpt_model(self.source, params_dtype=self.params_dtype)
            load_hf_weights(self.model, self.source)

    def per_token(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        logits = self.model(ids, positions, None, runtime_gather_output=True)[:, :-1]  # its own loss is in float32
        return loss_per_token(logits, ids)


def gpt_run(source: Path, dtype: torch.dtype, only: str | None = None) -> dict[str, Any]:
    size = rank_of()[1]
    module = OfMegatron(source, dtype)
    named_one = {name: config for name, config in named(dtype).items() if only in (None, name)}
    fit(module, named_one, batches(only=only), MegatronLoRAStrategy(tensor_parallel_size=size), size)
    found = outcome(module)
    for adapter in found.values():
        adapter.pop("loss")
    return found


@pytest.fixture(scope="module")
def source(directory: Path) -> Path:
    hugging_face().save_pretrained(directory / "hugging_face")
    return directory / "hugging_face"


@pytest.fixture(scope="module")
def gpt_apart(source: Path) -> dict[torch.dtype, Any]:
    return _gpt_apart(source)[0]


@on_ranks(1)
def _gpt_apart(source: Path) -> dict[torch.dtype, Any]:
    """Return runs of one adapter each, on one rank."""
    runs = {dtype: [gpt_run(source, dtype, only) for only in named(dtype)] for dtype in TOLERANCES}
    return {dtype: functools.reduce(operator.or_, found) for dtype, found in runs.items()}


@on_ranks(2)
def test_a_model_of_megatron_core_split_over_ranks_equals_runs_apart(
    source: Path, gpt_apart: dict[torch.dtype, Any]
) -> None:
    for dtype, tolerance in TOLERANCES.items():
        found = gpt_run(source, dtype)
        torch.testing.assert_close(found, gpt_apart[dtype], **tolerance)
        torch.testing.assert_close(*from_all_ranks(found), **EXACT)
