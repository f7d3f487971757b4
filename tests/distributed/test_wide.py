"""Heads of a base in half precision stay wide under every strategy: against one process, on two gloo ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import FSDPLoRAStrategy, LoRACallback, LoRAConfig, adapter_state_dict, inject, merge, remove
from lightning_lora.fabric import FSDPLoRAStrategy as FabricFSDPLoRAStrategy
from lightning_lora.model.state import named_trained_whole
from tests import models, runs
from tests.distributed.ranks import on_ranks
from tests.distributed.training import from_all_ranks, rank_of, state

BATCH, STEPS = 4, 8
# the token table trains too: in shards, where the strategy shards what trains
CONFIG = {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["score", "embed_tokens"]}
TRAINED = ("score.weight", "model.embed_tokens.weight")
IN_SHARDS = {"min_shard_numel": 1000, "shard_adapters": True}
STRATEGIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {  # of the Trainer, and of Fabric
    "ddp": (lambda: "ddp", lambda: "ddp"),
    "megatron_lora": (lambda: "megatron_lora", lambda: "megatron_lora"),
    "fsdp_lora": (
        lambda: FSDPLoRAStrategy(min_shard_numel=1000),
        lambda: FabricFSDPLoRAStrategy(min_shard_numel=1000),
    ),
    "trained in shards": (lambda: FSDPLoRAStrategy(**IN_SHARDS), lambda: FabricFSDPLoRAStrategy(**IN_SHARDS)),
}
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def classifier(dtype: torch.dtype) -> Any:
    """A Llama for classes whose heads four ranks divide."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=models.VOCAB, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return models._seeded(lambda: LlamaForSequenceClassification(config)).to(dtype)


class Module(pl.LightningModule):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = classifier(dtype)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch, labels=batch[:, 0] % 3).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=1e-4)  # each step's update is far below the spacing of half precision


def scaler() -> MixedPrecision:
    # Lightning makes 16-mixed into bf16-mixed on CPU, unless it is given the plugin
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))


CASES: dict[str, tuple[torch.dtype, Callable[[], dict[str, Any]]]] = {
    "bf16": (torch.bfloat16, lambda: {"precision": "bf16-true"}),
    "converted": (torch.float32, lambda: {"precision": "bf16-true"}),
    "scaled": (torch.float16, lambda: {"plugins": [scaler()]}),
}


def rows(rank: int, num_ranks: int) -> Tensor:
    """Return this rank's rows of every global batch."""
    all_rows = models.token_ids(BATCH * STEPS, 8, seed=1).clamp(min=1)
    return torch.cat([batch.chunk(num_ranks)[rank] for batch in all_rows.split(BATCH)])


def trained(directory: Path, case: str, strategy: str = "auto") -> Module:
    dtype, settings = CASES[case]
    rank, num_ranks = rank_of()
    parts = 1 if strategy == "megatron_lora" else num_ranks  # ranks that share a model see the same rows
    trainer = runs.trainer(
        directory,
        LoRACallback(**CONFIG),
        ModelCheckpoint(directory, save_last=True, save_top_k=0),
        devices=num_ranks,
        strategy=STRATEGIES[strategy][0]() if strategy in STRATEGIES else strategy,
        use_distributed_sampler=False,
        **settings(),
    )
    module = Module(dtype)
    trainer.fit(module, DataLoader(rows(rank % parts, parts), batch_size=BATCH // parts))
    return module


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, dict[str, Tensor]]:
    return {case: dict(adapter_state_dict(trained(directory / case, case).model)) for case in CASES}


def dtypes(parameters: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in parameters}


def dtypes_left(strategy: str) -> set[torch.dtype]:
    """Return the dtypes of a model from which adapters were taken out: what is in shards stays wide."""
    return {torch.bfloat16, torch.float32} if strategy == "trained in shards" else {torch.bfloat16}


@strategies
@pytest.mark.parametrize("case", CASES)
@on_ranks(2)
def test_every_step_counts_as_in_one_process(
    tmp_path: Path, single: dict[str, dict[str, Tensor]], strategy: str, case: str
) -> None:
    module = trained(tmp_path, case, strategy)
    assert dtypes(named_trained_whole(module.model).values()) == {torch.float32}
    start, adapters = classifier(CASES[case][0]).state_dict(), state(module)
    for name in TRAINED:
        expected = single[case][name]
        moved = (expected - start[name].float()).abs().max().item()
        assert moved > 0
        # what ranks add up was rounded to half precision on each: 2^-8 of the largest addend
        torch.testing.assert_close(adapters[name], expected, rtol=0, atol=0.05 * moved)
    for name, value in from_all_ranks(adapters)[0].items():
        assert torch.equal(adapters[name], value)

    if case == "bf16":
        if rank_of()[0] == 0:  # the file holds them wide
            saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
            assert all(torch.equal(saved[f"model.{name}"], adapters[name]) for name in TRAINED)
        remove(module.model)
        assert dtypes(module.model.parameters()) == dtypes_left(strategy)
    if case == "converted":
        assert_merged_for_good(module.model, strategy)


def assert_merged_for_good(model: Any, strategy: str) -> None:
    ids = models.token_ids().clamp(min=1)
    with torch.no_grad():
        adapted = model(ids).logits
        merge(model, remove=True)
        merged = model(ids).logits
    assert dtypes(model.parameters()) == dtypes_left(strategy)
    assert merged.dtype == torch.bfloat16
    # a merged weight is rounded once, the sum of base and adapter at another place
    torch.testing.assert_close(merged, adapted, rtol=5e-2, atol=5e-2)


@strategies
@on_ranks(2)
def test_a_step_in_fabric_on_a_base_that_it_converts_counts(strategy: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=STRATEGIES[strategy][1](), precision="bf16-true")
    fabric.launch()
    model = inject(classifier(torch.float32), LoRAConfig(**CONFIG))
    before = model.score.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    wrapped, optimizer = fabric.setup(model, optimizer)
    batch = rows(0, 1)[:BATCH]
    fabric.backward(wrapped(batch, labels=batch[:, 0] % 3).loss)
    optimizer.step()
    head = adapter_state_dict(model)["score.weight"]
    assert dtypes(named_trained_whole(model).values()) == {torch.float32}
    assert (head != before).all()
    assert torch.equal(head, from_all_ranks(head)[0])
