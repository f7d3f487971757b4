"""One rank of Trainer steps whose loss is made from the parts of the output head, or averaged over ranks."""

import itertools
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_lora import FSDPLoRAStrategy, MegatronLoRAStrategy, linear_cross_entropy
from lightning_lora.ops.cross_entropy import tiles
from lightning_lora.ops.sharded import is_sharded, logical, spread_like, write
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.launch import report
from tests.distributed.split import four_heads
from tests.distributed.training import BATCH, SHARDED, fit, rank_loader
from tests.live_bytes import watched
from tests.runs import ROWS, LanguageModule


def odd() -> nn.Module:
    """A Llama with a vocabulary that no number of ranks divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=models.VOCAB + 1,
    )  # fmt: skip
    return models._seeded(lambda: LlamaForCausalLM(config))


def capped() -> nn.Module:
    """A Gemma 2, which keeps its logits within bounds, and scales what its embedding gives."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8, vocab_size=models.VOCAB, final_logit_softcapping=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return models._seeded(lambda: Gemma2ForCausalLM(config))


def padded() -> nn.Module:
    """A Llama whose padding token is in the last rank's rows."""
    model = four_heads()
    model.get_input_embeddings().padding_idx = models.VOCAB - 1
    return model


HEADLESS = {"target_modules": ["q_proj", "down_proj"]}
HEAD = {"target_modules": ["q_proj", "down_proj", "lm_head"]}
TABLE = {"target_modules": ["q_proj", "embed_tokens"]}
TILE = (2, 40)  # of the logits that are there at once; not what the sizes of these models would choose
SAME_DATA = {"train_dataloaders": rank_loader(0, 1)}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (four_heads, {}),
    "tied llama": (lambda: four_heads(tied=True), {}),
    "adapted head": (four_heads, {"lora": HEAD}),
    "adapted head with dropout": (four_heads, {"lora": {**HEAD, "dropout": 0.3}}),
    "adapted table": (four_heads, {"lora": TABLE}),
    "trained table": (four_heads, {"lora": {"modules_to_save": ["embed_tokens"]}}),
    "gemma2": (capped, {}),
    "odd vocabulary": (odd, {}),
    "padding": (padded, {}),
    "bf16": (four_heads, {"precision": "bf16-mixed"}),
    "nothing learned": (four_heads, {}),
}
# by the number of ranks: how many share a model, and which; on four, quarters of a vocabulary, and replicas
SPLITS: dict[int, list[tuple[int, str]]] = {
    2: [(2, case) for case in CASES],
    4: [(4, "llama"), (4, "tied llama"), (4, "padding"), (4, "odd vocabulary"), (2, "llama")],
}
AVERAGED: dict[str, tuple[str, Any, int]] = {  # models, strategies, and how many ranks share a model
    "ddp": ("llama", lambda: "ddp", 1),
    "fsdp_lora": ("llama", lambda: FSDPLoRAStrategy(**SHARDED), 1),
    "fsdp_lora, tied": ("tied llama", lambda: FSDPLoRAStrategy(**SHARDED), 1),
    "megatron_lora": ("llama", lambda: MegatronLoRAStrategy(tensor_parallel_size=2), 2),
}


def labels_of(batch: Tensor) -> Tensor:
    """Leave the first row's beginning, and every third position, out of the loss."""
    labels = batch.clone()
    labels[:, ::3] = -100
    labels[0, :5] = -100
    return labels


class Predicting(LanguageModule):
    """Keeps the loss and the gradients of its only step, and what went between ranks for the loss."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.model = CASES[case][0]().train()
        self.learns = case != "nothing learned"
        self.found: dict[str, Any] = {}

    def labels(self, batch: Tensor) -> Tensor:
        return labels_of(batch) if self.learns else torch.full_like(batch, -100)

    def loss(self, batch: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.model(batch).last_hidden_state
        with counted_collectives() as traffic:
            loss = linear_cross_entropy(self.model, hidden, labels)
        self.found["traffic"] = dict(traffic)
        return loss

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Let no factor be zero, of which the other's gradient would be too: the same values however they lie."""
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                write(parameter, 0.1 * torch.randn(logical(parameter).shape, generator=generator))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.found:
            return None
        labels = self.labels(batch)
        self.found["learned"] = int((labels[:, 1:] != -100).sum())
        loss = self.loss(batch, labels)
        self._counting = counted_collectives()
        self._backward = self._counting.__enter__()
        self.found["loss"] = loss.detach().clone()
        return loss

    def on_after_backward(self) -> None:
        self._counting.__exit__(None, None, None)
        self.found["backward"] = dict(self._backward)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        self.found["gradients"] = {name: p.grad.clone() for name, p in named}
        self.found["split"] = sorted(name for name, p in self.named_parameters() if is_sharded(p))
        self.parameters_by_name = dict(self.named_parameters())


def expected_parts(module: Predicting, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return of one process's gradients what this rank has."""
    return {name: spread_like(value, module.parameters_by_name[name]).clone() for name, value in gradients.items()}


class Averaged(Predicting):
    """Divides by the mean number of labels, of which every row has others and some have none."""

    def __init__(self, case: str, num_items: float | None = None) -> None:
        super().__init__(case)
        self.num_items = num_items
        self.found = {"labels": [], "traffic": [], "largest": [], "losses": []}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        labels = unequal_labels(batch)
        num_labels = (labels[:, 1:] != -100).sum().float()
        self.found["labels"].append(int(num_labels))  # reduce() changes it in place
        num_items = self.num_items or self.trainer.strategy.reduce(num_labels, reduce_op="mean")
        hidden = self.model.model(batch).last_hidden_state
        with counted_collectives() as traffic, watched(self.model.lm_head.weight.shape[1]) as found:
            loss = linear_cross_entropy(self.model, hidden, labels, num_items=num_items)
        self.found["traffic"].append(dict(traffic))
        self.found["largest"].append(found.largest)
        self.found["losses"].append(loss.detach().clone())
        self._counting = counted_collectives()
        self._backward = self._counting.__enter__()
        return loss


def unequal_labels(batch: Tensor) -> Tensor:
    """Learn the tokens that are larger than their row's first; some rows have none."""
    return batch.masked_fill(batch <= batch[:, :1], -100)


def averaged(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Take one step on one global batch, and one on two that are accumulated."""
    rank, single = int(os.environ["RANK"]), torch.load(directory / "single.pt", weights_only=True)
    found = {}
    for (name, (case, strategy, sharing)), num_batches in itertools.product(AVERAGED.items(), (1, 2)):
        num_parts = num_ranks // sharing * num_batches
        labels = unequal_labels(models.token_ids(ROWS, 8, seed=1)[: BATCH * num_batches])
        module = Averaged(case, int((labels[:, 1:] != -100).sum()) / num_parts if num_batches > 1 else None)
        fit(
            None, module, strategy(), lora=HEADLESS,
            loaders={"train_dataloaders": rank_loader(rank // sharing, num_ranks // sharing)},
            limit_train_batches=num_batches, accumulate_grad_batches=num_batches,
        )  # fmt: skip
        found[f"{name}, {num_batches}"] = {
            **module.found,
            "expected": expected_parts(module, single[f"whole {case}, {num_batches}"]),
        }
    return found


def split(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Split each model over ranks that get the same data."""
    single = torch.load(directory / "single.pt", weights_only=True)
    found: dict[str, Any] = {}
    for size, case in SPLITS[num_ranks]:
        pl.seed_everything(7, verbose=False)
        module, strategy = Predicting(case), MegatronLoRAStrategy(tensor_parallel_size=size)
        fit(None, module, strategy, loaders=SAME_DATA, limit_train_batches=1, **CASES[case][1])
        found[f"{case}, {size} ranks"] = {**module.found, "expected": expected_parts(module, single[case])}
    return found


PARTS = {part.__name__: part for part in (split, averaged)}


if __name__ == "__main__":
    tiles._tile = lambda *_: TILE
    report(Path(sys.argv[1]), PARTS[sys.argv[2]](Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])))
