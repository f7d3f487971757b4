"""One rank that trains heads of a base in half precision, in Trainer and Fabric, under the strategy it is told."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import FSDPLoRAStrategy, LoRACallback, LoRAConfig, adapter_state_dict, inject, merge, remove
from lightning_lora.fabric import FSDPLoRAStrategy as FabricFSDPLoRAStrategy
from lightning_lora.model.state import named_trained_whole
from lightning_lora.ops.sharded import whole
from tests import models, runs
from tests.distributed.gpt import Module as GPTModule
from tests.distributed.gpt import run
from tests.distributed.launch import report

BATCH, STEPS = 4, 8
# the token table trains too: in shards, where the strategy shards what trains
CONFIG = {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["score", "embed_tokens"]}


def classifier(dtype: torch.dtype) -> Any:
    """A Llama for classes whose heads four ranks divide."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=models.VOCAB, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return models._seeded(lambda: LlamaForSequenceClassification(config)).to(dtype)


def rows(rank: int, num_ranks: int) -> Tensor:
    """Return this rank's rows of every global batch."""
    whole = models.token_ids(BATCH * STEPS, 8, seed=1).clamp(min=1)
    return torch.cat([batch.chunk(num_ranks)[rank] for batch in whole.split(BATCH)])


class Module(pl.LightningModule):
    def __init__(self, dtype: torch.dtype, *, lr: float) -> None:
        super().__init__()
        self.model, self.lr = classifier(dtype), lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch, labels=batch[:, 0] % 3).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr)


def train(directory: Path, strategy: Any, rank: int, num_ranks: int, dtype: torch.dtype, **settings: Any) -> Any:
    """Return the module after a run in which each step's update is far below the spacing of half precision."""
    module = Module(dtype, lr=1e-4)
    parts = 1 if strategy == "megatron_lora" else num_ranks  # ranks that share a model see the same rows
    file = ModelCheckpoint(directory, save_last=True, save_top_k=0)
    trainer = runs.trainer(
        directory,
        LoRACallback(**CONFIG),
        file,
        devices=num_ranks,
        strategy=strategy,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, DataLoader(rows(rank % parts, parts), batch_size=BATCH // parts))
    return module


def scaler() -> MixedPrecision:
    # Lightning makes 16-mixed into bf16-mixed on CPU, unless it is given the plugin
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))


def dtypes(model: Any) -> list[str]:
    return sorted({str(parameter.dtype) for parameter in named_trained_whole(model).values()})


def fabric_moves(strategy: Any, num_ranks: int) -> dict[str, Any]:
    """Return how far a head moves in one step in Fabric, on a base that Fabric converts."""
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=strategy, precision="bf16-true")
    fabric.launch()
    model = inject(classifier(torch.float32), LoRAConfig(**CONFIG))
    before = model.score.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    wrapped, optimizer = fabric.setup(model, optimizer)
    batch = rows(0, 1)[:BATCH]
    fabric.backward(wrapped(batch, labels=batch[:, 0] % 3).loss)
    optimizer.step()
    now = adapter_state_dict(model)["score.weight"]
    return {"dtypes": dtypes(model), "moved": bool((now != before).all()), "values": now}


def merged_for_good(model: Any) -> dict[str, Any]:
    """Return the model's output before and after its adapters are merged, and the dtypes that are left."""
    ids = models.token_ids().clamp(min=1)
    with torch.no_grad():
        adapted = model(ids).logits
        merge(model, remove=True)
        merged = model(ids).logits
    return {"dtypes": sorted({str(p.dtype) for p in model.parameters()}), "adapted": adapted, "merged": merged}


GPT = {"target_modules": ["q_proj"], "modules_to_save": ["q_layernorm", "final_layernorm", "output_layer"]}


class Plain(GPTModule):
    """Steps by SGD, which rounding does not turn into whole steps."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def gpt(directory: Path, num_ranks: int) -> dict[str, Any]:
    """What of a Megatron-core model trains in bf16, whole on each rank (1) and in parts (2)."""
    found: dict[str, Any] = {}
    for size in (1, num_ranks):
        for name, source, lora in (("heads", "hf", GPT), ("biases", "biased", {"bias": "lora_only"})):
            module = Plain(directory / source)
            run(directory / f"{name}{size}", size, module, precision="bf16-true", lora=lora)
            named = named_trained_whole(module.model)
            found[f"{name} {size}"] = {
                "dtypes": dtypes(module.model),
                "trained": {name: whole(p).detach().clone() for name, p in named.items()},
            }
            remove(module.model)
            parameters = dict(module.model.named_parameters())
            found[f"{name} {size}"]["removed"] = sorted({str(p.dtype) for p in parameters.values()})
            found[f"{name} {size}"]["start"] = {name: whole(parameters[name]).detach().clone() for name in named}
    return found


def main(directory: Path, name: str) -> None:
    if name == "gpt":
        report(directory, gpt(directory, int(os.environ["WORLD_SIZE"])))
        return
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    strategies: dict[str, Any] = {
        "ddp": (lambda: "ddp", lambda: "ddp"),
        "megatron_lora": (lambda: "megatron_lora", lambda: "megatron_lora"),
        "fsdp_lora": (
            lambda: FSDPLoRAStrategy(min_shard_numel=1000),
            lambda: FabricFSDPLoRAStrategy(min_shard_numel=1000),
        ),
        "trained in shards": (
            lambda: FSDPLoRAStrategy(min_shard_numel=1000, shard_adapters=True),
            lambda: FabricFSDPLoRAStrategy(min_shard_numel=1000, shard_adapters=True),
        ),
    }
    own, fabrics = strategies[name]
    found: dict[str, Any] = {}
    for case, dtype, settings in (
        ("bf16", torch.bfloat16, {"precision": "bf16-true"}),
        ("converted", torch.float32, {"precision": "bf16-true"}),
        ("scaled", torch.float16, {"plugins": [scaler()]}),
    ):
        module = train(directory / case, own(), rank, num_ranks, dtype, **settings)
        trained = {name: value.clone() for name, value in adapter_state_dict(module).items()}
        found[case] = {"dtypes": dtypes(module.model), "trained": trained}
        if case == "bf16":
            remove(module.model)
            found["removed"] = sorted({str(p.dtype) for p in module.model.parameters()})
        if case == "converted":
            found["merged"] = merged_for_good(module.model)
    found["fabric"] = fabric_moves(fabrics(), num_ranks)
    report(directory, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
